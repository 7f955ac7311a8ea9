"""`dtt tokenizer compare`: figures against counting by hand, and names that are none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from dtt.cli import main
from dtt.config.data import Bpe, Data
from dtt.config.sources import Text
from dtt.data.inspection import tokenizer_comparison
from dtt.data.inspection.tokenizer_comparison import compare, read_texts
from dtt.data.preparation.prepare import prepare
from dtt.tokenizer import CharTokenizer, train_bpe

TEXTS = ["the fox and the fox\n", "naïve café, 🦊🦊\n", "x"]


class Lossy(CharTokenizer):
    """Forgets letters that are not in its alphabet."""


def test_figures_are_those_of_the_tokens():
    tokenizer = Lossy("the fox and\n")
    found = compare("lossy", tokenizer, TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    letters = sum(len(text) for text in TEXTS)
    assert (found.tokens, found.vocab_size) == (letters, 2 + len(tokenizer.alphabet))
    assert found.bytes_per_token == size / letters
    strange = sum(char not in "the fox and\n" for text in TEXTS for char in text)
    assert strange and found.unknown_share == strange / letters
    assert found.changed == 1
    assert found.vocabulary_used == len(set("".join(TEXTS)) & set(tokenizer.alphabet)) + 1
    assert found.megabytes_per_second > 0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a text, a prepared corpus of it, and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    text = "".join(f"the fox {i} and the naïve fox\n\n" for i in range(200))
    Path("a.txt").write_text(text, encoding="utf-8")
    source = Text(path=("a.txt",), separator="\n\n")
    corpus = prepare(Data(source=source, dir=Path("data"), workers=1), Bpe(vocab_size=300))
    Path("t.json").write_text(train_bpe(iter(TEXTS), 280, ["</s>"]).to_json(), encoding="utf-8")
    return corpus.folder


def table(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, Any]]:
    assert main(["tokenizer", "compare", *words, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {row["name"]: row for row in rows}


def test_every_kind_of_name(folder, capsys):
    run = Path("runs/r")
    run.mkdir(parents=True)
    (run / "tokenizer.json").write_text(Path("t.json").read_text(), encoding="utf-8")
    names = ["t.json", str(folder), folder.name, "a-bpe", "runs/r", "r", "char", "byte"]
    rows = table(capsys, *names, "--on", "a.txt")
    assert list(rows) == names
    size = Path("a.txt").stat().st_size
    assert rows["byte"]["tokens"] == size and rows["byte"]["bytes_per_token"] == 1
    assert rows["char"]["tokens"] == len(Path("a.txt").read_text())
    for same in (["t.json", "runs/r", "r"], [str(folder), folder.name, "a-bpe"]):
        assert len({rows[name]["tokens"] for name in same}) == 1
    assert rows["a-bpe"]["tokens"] < rows["t.json"]["tokens"] < size
    assert all(row["changed"] == 0 and row["unknown_share"] == 0 for row in rows.values())


def test_on_a_corpus_the_validation_text_is_read(folder, capsys):
    rows = table(capsys, "byte", "--on", str(folder))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert rows["byte"]["tokens"] == manifest["totals"]["val"]["bytes"]
    assert rows["byte"]["on"] == f"{folder}, val"
    rows = table(capsys, "byte", "--on", folder.name, "--split", "train")
    assert rows["byte"]["tokens"] == manifest["totals"]["train"]["bytes"]


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 64, 10_000])
def test_pieces_of_a_file_are_whole_characters(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(tokenizer_comparison, "PIECE", piece)
    path = tmp_path / "a.txt"
    text = "naïve 🦊🦊 中文字 end"
    path.write_text(text, encoding="utf-8")
    _, texts = read_texts(str(path), "val", 10_000)
    joined, place = "".join(texts), 0
    for letter in joined:  # in order, and only characters that a cut fell into are left out
        place = text.index(letter, place) + 1
    if piece > 4:
        assert len(joined) >= len(text) - path.stat().st_size // piece
    else:
        assert set("nave end") <= set(joined)
    if piece == 10_000:
        assert joined == text


def test_a_large_text_is_read_in_part_and_all_over(folder, monkeypatch):
    monkeypatch.setattr(tokenizer_comparison, "PIECE", 100)
    text = Path("a.txt").read_text(encoding="utf-8")
    _, texts = read_texts("a.txt", "val", 1000)
    assert len(texts) == 10 and all(piece in text for piece in texts)
    assert text.index(texts[0]) == 0 and text.index(texts[-1]) > 0.8 * len(text)
    _, texts = read_texts(str(folder), "train", 500)
    assert 400 <= sum(len(piece.encode()) for piece in texts) <= 500
    assert len(texts) > 5


@pytest.mark.parametrize("most", [1, 2, 10, 11, 100, 5000])
def test_no_more_bytes_are_read_than_asked_for(folder, most):
    Path("wide.txt").write_text("aé中🦊" * 1000, encoding="utf-8")
    for name in ("a.txt", "wide.txt", str(folder)):
        _, texts = read_texts(name, "train", most)
        # Of documents the last one may be short.
        least = most - 4 if name != str(folder) else most // 2
        assert least < sum(len(text.encode()) for text in texts) <= most


def test_one_corpus_of_a_mixture(folder, capsys):
    second = Path("data/second")
    shutil.copytree(folder, second)
    parts = [
        {"name": "fox", "weight": 1, "source": {"name": "tales"}},
        {"name": "owl", "weight": 1, "source": {"name": "stdlib"}},
    ]
    step = Path("runs/r/checkpoints/step-00000001")
    step.mkdir(parents=True)
    Path("runs/r/config.yaml").write_text(json.dumps({"data": {"mixture": parts}}))
    (step / "state.json").write_text(json.dumps({"corpus": f"{folder.name}+second"}))
    rows = table(capsys, "byte", "--on", "runs/r", "--source", "owl")
    assert rows["byte"]["on"] == "data/second, val"
    for words, message in (
        ([], "runs/r was trained on a mixture; choose a --source: fox, owl"),
        (["--source", "x"], "--source x: the mixture of runs/r has none of that name; choose a"),
    ):
        assert main(["tokenizer", "compare", "byte", "--on", "runs/r", *words]) == 2
        assert message in capsys.readouterr().err


def test_an_encoding_of_tiktoken(folder, monkeypatch, capsys):
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=r"\s?\S+|\s",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    rows = table(capsys, "gpt2", "byte", "--on", "a.txt")
    assert rows["gpt2"]["tokens"] == rows["byte"]["tokens"]
    assert (rows["gpt2"]["vocab_size"], rows["gpt2"]["changed"]) == (257, 0)

    def no_network(name: str) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    assert main(["tokenizer", "compare", "gpt2", "--on", "a.txt"]) == 3
    assert "the tiktoken encoding gpt2 is not in its cache" in capsys.readouterr().err


def test_the_table(folder, capsys):
    assert main(["tokenizer", "compare", "byte", "char", "--on", "a.txt"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"a.txt: {Path('a.txt').stat().st_size:,} bytes in 1 texts"
    assert lines[1].split() == ["vocabulary", "used", "tokens", "bytes/token", "MB/s", "round",
                                "trip", "unknown"]  # fmt: skip
    assert lines[2].split()[0] == "byte" and lines[2].split()[-2:] == ["exact", "none"]
    assert lines[4].startswith("char: made from this very text")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("nothing --on a.txt", 3, "nothing is not a tokenizer: no tokenizer.json there, and not"),
        ("a.txt --on a.txt", 3, "a.txt is not a tokenizer: no valid JSON"),
        ("byte byte --on a.txt", 2, "the same tokenizer is named twice"),
        ("byte --on gone.txt", 3, "gone.txt is not a prepared corpus"),
        (
            "byte --on wide.txt --max-bytes 1",
            3,
            "corpus, or more --max-bytes than 1",
        ),
        ("byte --on a.txt --source x", 2, "--source x: a.txt is a text file; leave --source out"),
        ("byte --on empty.txt", 3, "empty.txt has no text"),
        ("byte --on bad.txt", 3, "bad.txt: byte 2 (0xff) is not utf-8"),
        ("byte", 2, "the following arguments are required: --on"),
        ("", 2, "the following arguments are required"),
    ],
)
def test_wrong_requests_are_one_line(folder, capsys, words, code, message):
    Path("empty.txt").write_text("", encoding="utf-8")
    Path("wide.txt").write_text("🦊", encoding="utf-8")
    Path("bad.txt").write_bytes(b"ab\xff")
    assert main(["tokenizer", "compare", *words.split()]) == code
    streams = capsys.readouterr()
    assert message in streams.err and streams.err.count("\n") == 1 and streams.out == ""
