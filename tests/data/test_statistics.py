"""Figures of a corpus: against counting the documents in plain Python."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from small_corpus import make_corpus

from dtt.cli import main
from dtt.data.inspection import scanning, statistics
from dtt.data.inspection.figures import lines, measure
from dtt.data.inspection.scanning import Scan
from dtt.data.inspection.statistics import (
    Lengths,
    count_lengths,
    count_tokens,
    find_repeats,
    histogram,
    sample_lengths,
)
from dtt.data.shards import DocumentIndex
from dtt.tokenizer import ByteTokenizer


def some_texts(count: int, seed: int) -> list[str]:
    """Texts of which many are equal, and some differ only in their last letter."""
    draw = random.Random(seed)
    return ["a" * draw.choice([1, 2, 3, 30]) + draw.choice("bcd") for _ in range(count)]


def plain(texts: list[str]) -> tuple[int, int]:
    """(documents beyond the first of each kind, their tokens), by counting."""
    kinds = Counter(texts)
    again = {text: n - 1 for text, n in kinds.items()}
    return sum(again.values()), sum(n * (len(text) + 1) for text, n in again.items())


@pytest.mark.parametrize("block", [4, 16, 1 << 20])
def test_lengths_tokens_and_repeats_are_those_of_the_text(tmp_path, monkeypatch, block):
    monkeypatch.setattr(statistics, "BLOCK", block)
    monkeypatch.setattr(scanning, "RELEASE", 100_000)  # after every other read
    texts = {"train": some_texts(50, 1), "val": [*some_texts(20, 2), "only here", "only here"]}
    corpus = make_corpus(tmp_path / "c", texts, ByteTokenizer(), per_shard=7)
    figures = measure(corpus, 10**9)
    for split, found in figures.items():
        sizes = [len(text) + 1 for text in texts[split]]
        assert dict(zip(found.lengths.values, found.lengths.counts, strict=True)) == Counter(sizes)
        assert (found.repeats.repeats, found.repeats.tokens) == plain(texts[split])
        assert found.repeats.searched == len(sizes) and found.compared
        counted = Counter(ord(letter) for text in texts[split] for letter in text)
        expected = counted | Counter({256: len(sizes)})
        assert found.usage.counts.tolist() == [expected[i] for i in range(257)]
        assert found.usage.read == sum(sizes) and found.usage.exact
        copies, first = found.repeats.groups[0]
        assert texts[split].index(texts[split][first]) == first
        assert Counter(texts[split]).most_common(1)[0][1] == copies
        shares = np.array(list(expected.values())) / sum(sizes)
        assert found.usage.entropy == pytest.approx(-(shares * np.log2(shares)).sum(), abs=1e-12)
    known = set(texts["train"])
    leaked = sum(text in known for text in texts["val"])
    assert figures["val"].repeats.found_in(figures["train"].repeats) == leaked
    assert leaked < len(texts["val"])


def test_a_repeated_text_is_not_its_own_duplicate(tmp_path):
    corpus = make_corpus(tmp_path / "c", {"train": ["a", "b", "a"], "val": ["c"]}, ByteTokenizer(),
                         repeat=3)  # fmt: skip
    figures = measure(corpus, 10**9)
    assert (figures["train"].documents, figures["train"].copies) == (9, 3)
    assert (figures["train"].repeats.repeats, figures["train"].repeats.searched) == (1, 3)
    assert any("written 3 times" in line for line in lines(corpus, figures))


def test_quantiles():
    lengths = Lengths(np.array([2, 5, 9]), np.array([1, 8, 1]))
    assert [lengths.quantile(q) for q in (0.05, 0.1, 0.11, 0.9, 0.91, 1.0)] == [2, 2, 5, 5, 9, 9]


@pytest.mark.parametrize("rows", [1, 3, 16, 60])
def test_a_histogram_has_every_document(rows):
    draw = np.random.default_rng(0)
    values = np.unique(draw.integers(1, 5000, 300))
    lengths = Lengths(values, draw.integers(1, 9, len(values)))
    bins = histogram(lengths, rows)
    assert len(bins) <= rows
    assert bins[0][0] == values[0] and bins[-1][1] == values[-1]
    assert all(a[1] + 1 == b[0] for a, b in pairwise(bins))
    for low, high, count in bins:
        assert count == lengths.counts[(values >= low) & (values <= high)].sum()


def test_a_sample_of_lengths_keeps_pairs_and_the_limit(tmp_path):
    texts = [text for text in some_texts(400, 3) for _ in range(2)]
    texts += ["x" * size for size in range(40, 60) for _ in range(size % 3 + 1)]
    corpus = make_corpus(tmp_path / "c", {"train": texts}, ByteTokenizer(), per_shard=100)
    index = DocumentIndex(corpus.folder, corpus.manifest, "train")
    lengths = count_lengths(index)
    limit = sum(len(text) + 1 for text in texts) // 3
    found = []
    for seed in range(6):
        chosen = sample_lengths(lengths, limit, seed)
        assert set(chosen.tolist()) < set(lengths.values.tolist())
        kept = [text for text in texts if len(text) + 1 in chosen.tolist()]
        assert sum(len(text) + 1 for text in kept) <= limit
        repeats = find_repeats(Scan(corpus, "train"), index, chosen, 1)
        assert (repeats.repeats, repeats.tokens) == plain(kept)
        assert repeats.searched == len(kept)
        found.append(tuple(chosen.tolist()))
        assert found[-1] == tuple(sample_lengths(lengths, limit, seed).tolist())
    assert len(set(found)) > 1


def test_a_sample_of_tokens_is_of_whole_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK", 10)
    corpus = make_corpus(tmp_path / "c", {"train": ["x" * 96] * 4}, ByteTokenizer())
    usage = count_tokens(Scan(corpus, "train"), 257, 50)
    assert (usage.read, usage.exact, usage.counts.sum()) == (50, False, 50)
    whole = count_tokens(Scan(corpus, "train"), 257, 388)
    assert (whole.read, whole.exact) == (388, True)


def test_the_command_says_what_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = {"train": some_texts(60, 1), "val": ["not in train"]}
    make_corpus(Path("data/c"), texts, ByteTokenizer())
    assert main(["data", "stats", "c", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    repeats, tokens = plain(texts["train"])
    assert found["splits"]["train"]["repeats"]["documents"] == repeats
    assert found["splits"]["train"]["repeats"]["tokens"] == tokens
    assert found["left_out"] == {"undecodable documents, left out": 2}
    assert found["val_documents_in_train"] == 0
    used = {ord(letter) for text in texts["train"] for letter in text} | {256}
    assert set(range(257)) - set(found["tokens"]["unused"]) == used
    assert main(["data", "stats", "c", "-o", "lengths.png"]) == 0
    out = capsys.readouterr().out
    assert f"{repeats:,} ({repeats / 60:.2%})" in out
    assert "left out or repaired, undecodable documents, left out: 2" in out
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_a_sample_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(statistics, "BLOCK", 10)
    make_corpus(Path("data/c"), {"train": some_texts(60, 1), "val": ["a"]}, ByteTokenizer())
    assert main(["data", "stats", "c", "--max-tokens", "200"]) == 0
    out = capsys.readouterr().out
    assert "all of the lengths chosen by seed 0; --max-tokens reads more" in out
    assert re.search(r"(19\d|200) tokens of it, seed 0", out)


def test_a_picture_without_matplotlib_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_corpus(Path("data/c"), {"train": ["a"], "val": ["a"]}, ByteTokenizer())
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert main(["data", "stats", "c", "-o", "x.png"]) == 2
    assert capsys.readouterr().err.endswith("is missing; pip install 'dtt[plot]'\n")


def test_cleaning_is_told(tmp_path):
    corpus = make_corpus(tmp_path / "c", {"train": ["a"], "val": ["a"]}, ByteTokenizer())
    corpus.manifest.cleaning.append(
        {"name": "length", "removed": 1200, "changed": 3, "reasons": {"too short": 1200}}
    )
    text = "\n".join(lines(corpus, measure(corpus, 100)))
    assert "cleaning, length: 1,200 removed (too short 1,200), 3 changed" in text


def test_a_picture_of_an_unknown_kind_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_corpus(Path("data/c"), {"train": ["a"], "val": ["a"]}, ByteTokenizer())
    for name, code in (("x.jpx", 2), ("gone/x.png", 5)):
        assert main(["data", "stats", "c", "-o", name]) == code
        err = capsys.readouterr().err
        assert err.startswith("dtt data: error: ") and name in err and err.count("\n") == 1
