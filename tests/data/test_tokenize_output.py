"""What `dtt tokenize` says of what it made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dtt.cli import main

TEXT = "the fox and the fox sat in a row\n\n" * 40
MIXTURE = """
data:
  workers: 1
  mixture:
    - {name: foxes, weight: 1, source: {name: text, path: a.txt}, cleaning: [unicode]}
    - {name: tales, weight: 1, source: {name: tales, stories: 60}}
tokenizer: {name: %s}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT, encoding="utf-8")


def tokenize(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["tokenize", *words]) == 0
    return capsys.readouterr().out.splitlines()


ONE = ("--data-path", "a.txt", "--data.workers", "1")


def test_a_tokenizer_that_found_fewer_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    words = (*ONE, "--tokenizer", "bpe", "-v", "1024")
    first, folder, *rest = tokenize(capsys, *words)
    found = re.fullmatch(
        r"tokenizer bpe, (\d+) tokens \(1,024 asked: the text has no more pairs\), "
        r"2 bytes each  \(\d+\.\d s\)",
        first,
    )
    assert found and 257 < int(found[1]) < 1024
    assert rest[0].startswith("train: ") and rest[1].startswith("  val: ")
    again = tokenize(capsys, *words)
    assert again[0].endswith(" 2 bytes each  (prepared before)")
    assert again[1:] == [folder, *rest]
    assert tokenize(capsys, *words, "--force")[0].endswith(" s)")
    few = tokenize(capsys, *ONE, "--tokenizer", "bpe", "-v", "260")
    assert few[0].startswith("tokenizer bpe, 260 tokens, 2 bytes each  (")


def test_what_is_said_of_a_part_is_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(MIXTURE % "byte", encoding="utf-8")
    lines = tokenize(capsys, "-c", "run.yaml")
    assert lines[0].startswith("tokenizer byte, 257 tokens, 2 bytes each  (") and "s)" in lines[0]
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "foxes", "  unicode", "  train", "    val", "tales", "  train", "    val",
    ]  # fmt: skip
    assert tokenize(capsys, "-c", "run.yaml")[0].endswith("each  (prepared before)")
    for path in Path("data").glob("tales-*/manifest.json"):
        path.unlink()
    lines = tokenize(capsys, "-c", "run.yaml")
    assert re.search(r"\(\d+\.\d s\)$", lines[0])
    assert lines[1].endswith("  (prepared before)") and "before" not in lines[5]
