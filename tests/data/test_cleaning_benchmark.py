"""The benchmark of near-duplicates compares what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def dedup(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    module = __import__("dedup")
    yield module
    sys.modules.pop("dedup")


def test_pairs_are_as_similar_as_it_says(dedup) -> None:
    texts, pairs = dedup.make_corpus(300)
    assert len(texts) == 300 and 80 < len(pairs) < 120
    for first, later, similarity in pairs:
        assert first < later
        grams = [
            {tuple(words[i : i + 5]) for i in range(len(words) - 4)}
            for words in (texts[first].split(), texts[later].split())
        ]
        assert len(grams[0] & grams[1]) / len(grams[0] | grams[1]) == similarity
    assert dedup.make_corpus(300) == (texts, pairs)


def test_dtt_removes_the_later_one(dedup, tmp_path) -> None:
    texts, pairs = dedup.make_corpus(300)
    removed = dedup.by_dtt(texts, tmp_path, 0.7)
    later = {b for _, b, _ in pairs}
    assert removed <= later
    assert {b for _, b, s in pairs if s >= 0.9} <= removed
    recall, precision, wrong = dedup.quality(pairs, removed)
    assert recall > 0.9 and precision > 0.9 and wrong == 0
    assert dedup.quality(pairs, {b for _, b, s in pairs if s >= 0.8}) == [1.0, 1.0, 0]
    lonely = next(n for n in range(300) if all(n not in pair[:2] for pair in pairs))
    assert dedup.quality(pairs, {lonely}) == [0.0, 0.0, 1]


@pytest.mark.processes
@pytest.mark.thorough
def test_it_prints_its_tables() -> None:
    command = [sys.executable, str(FOLDER / "dedup.py"), "--quick", "--documents", "60"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "| dtt, as datatrove" in done.stdout and "| 0.95 to 1.00" in done.stdout
