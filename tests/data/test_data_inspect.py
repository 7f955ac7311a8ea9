"""`dtt data inspect`: the counts are those that the preparation then has."""

from __future__ import annotations

import re

import pytest

from dtt.cli import main
from dtt.config.data import Byte, Data
from dtt.config.load import load_config
from dtt.data.preparation.prepare import prepare

CONFIG = """data:
  source: {name: text, path: corpus.txt, separator: "\\n\\n"}
  cleaning:
    - unicode
    - name: length
      min_words: 4
    - pii
    - exact-dedup
    - near-dedup
"""
LONG = "This text has quite a few words, so that one of them may be another in a near duplicate {}."
TEXTS = [
    *("too short", "write to a@b.org or to nobody at all", "e\u0301 is not in its normal form"),
    *("the same text twice", "the same text twice", "the same text twice"),
    *(LONG.format("here"), LONG.format("there")),
    *(f"document number {i} of those that are {'x' * i} kept" for i in range(30)),
]


@pytest.fixture(autouse=True)
def corpus(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "run.yaml").write_text(CONFIG, encoding="utf-8")


def table(text: str) -> dict[str, tuple[int, int, int]]:
    rows = re.findall(r"(?m)^\d+ (\S+) +([\d,]+) +([\d,]+) +([\d,]+) +[\d.]+%$", text)
    return {name: (int(a), int(b), int(c)) for name, a, b, c in rows}


def test_it_shows_what_each_step_does(capsys) -> None:
    assert main(["data", "inspect", "-c", "run.yaml"]) == 0
    text = capsys.readouterr().out
    assert table(text) == {  # documents, removed, changed
        "unicode": (38, 0, 1),
        "length": (38, 1, 0),
        "pii": (37, 0, 1),
        "exact-dedup": (37, 2, 0),
        "near-dedup": (35, 1, 0),
    }
    assert "fewer than 4 words: 1 (2.6%)\n      too short" in text
    assert "write to a@b.org or to nobody at all\n      -> write to email@example.com or" in text
    assert f"nearly a duplicate: 1 (2.9%)\n      {LONG.format('there')[:88]}" in text
    assert r"e\u0301 is not in its" in text and r"-> \xe9 is not in its" in text
    assert "only those" not in text and "the whole corpus has more" in text


def test_preparing_then_does_the_same(capsys, tmp_path) -> None:
    main(["data", "inspect", "-c", "run.yaml"])
    shown = table(capsys.readouterr().out)
    data: Data = load_config(["run.yaml"]).data
    manifest = prepare(data.model_copy(update={"workers": 1}), Byte()).manifest
    assert {step["name"]: (step["removed"], step["changed"]) for step in manifest.cleaning} == {
        name: (removed, changed) for name, (_, removed, changed) in shown.items()
    }


def test_one_step_and_a_sample(capsys) -> None:
    assert main(["data", "inspect", "-c", "run.yaml", "--step", "pii", "--documents", "7"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("corpus: 7 documents") and "\n3 pii\n" in text
    assert "too short" not in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data.cleaning", "[]"], 2, "data.cleaning is empty: there is nothing to inspect"),
        (["--step", "gopher"], 2, "--step gopher: the steps are unicode, length, pii"),
        (["--documents", "0"], 2, "--documents: should be an integer of at least 1"),
        (
            ["--data.cleaning", "[{name: user, function: 'no_such:f'}]"],
            3,
            "no module named no_such",
        ),
        (["--data.source.path", "none.txt"], 3, "none.txt: no such file"),
    ],
)
def test_errors_are_one_line(capsys, arguments, code, message) -> None:
    assert main(["data", "inspect", "-c", "run.yaml", *arguments]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
