"""Duplicates: against sets of texts, sets of n-grams, and the exact Jaccard similarity."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from dtt.config.cleaning import ExactDedup, NearDedup
from dtt.data.cleaning.duplicates import ExactDuplicates, NearDuplicates, _first_of_each_group
from dtt.data.cleaning.shingles import ngram_hashes, word_hashes, words
from dtt.errors import DataError

SOURCE = random.Random(11)


def repeated(step, texts, parts=1, chosen=None):
    """Which texts are like an earlier one, when they lie in so many parts."""
    edges = np.linspace(0, len(texts), parts + 1).astype(int)
    signatures = [step.signature(text) for text in texts]
    with_one = [i for i, signature in enumerate(signatures) if signature is not None]
    packed = [
        step.pack([signatures[i] for i in with_one if a <= i < b]) for a, b in pairwise(edges)
    ]
    mask = np.ones(len(texts), bool) if chosen is None else chosen
    result = np.zeros(len(texts), bool)
    result[with_one] = step.repeated(packed, mask[with_one])
    return result.tolist()


def test_words() -> None:
    assert words("The CAT's (big) hat, Ünü_1!") == ["the", "cat", "s", "big", "hat", "ünü_1"]
    assert words("彼は山にA1登る") == [*"彼は山に", "a1", *"登る"]
    assert words(" .,\n") == []


def test_hashes_are_equal_where_ngrams_are() -> None:
    texts = [" ".join(SOURCE.choices("abcde", k=60)) for _ in range(20)]
    seen: dict[tuple[str, ...], int] = {}
    for text in texts:
        for n in (1, 3, 5, 13):
            found = words(text)
            grams = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
            for gram, value in zip(grams, ngram_hashes(word_hashes(text), n).tolist(), strict=True):
                assert seen.setdefault(gram, value) == value
    assert len(set(seen.values())) == len(seen) > 1000
    assert len(ngram_hashes(word_hashes("only three words"), 5)) == 1
    assert len(ngram_hashes(word_hashes(""), 5)) == 0


def test_exact_duplicates_are_those_of_a_set() -> None:
    texts = ["".join(SOURCE.choices("ab", k=SOURCE.randrange(8))) for _ in range(800)]
    expected = [text in texts[:i] for i, text in enumerate(texts)]
    for parts in (1, 3, 50):
        assert repeated(ExactDuplicates(ExactDedup()), texts, parts) == expected
    chosen = np.array([SOURCE.random() < 0.5 for _ in texts])
    left = [text if keep else None for text, keep in zip(texts, chosen, strict=True)]
    expected = [text is not None and text in left[:i] for i, text in enumerate(left)]
    assert repeated(ExactDuplicates(ExactDedup()), texts, 3, chosen) == expected


def test_folded_duplicates() -> None:
    texts = ["One two.", "one, TWO", "onetwo", "...", "!!!", "...", ""]
    assert repeated(ExactDuplicates(ExactDedup(fold=True)), texts) == [0, 1, 0, 0, 0, 1, 0]
    assert repeated(ExactDuplicates(ExactDedup()), texts) == [0, 0, 0, 0, 0, 1, 0]


def grams(text: str) -> frozenset[tuple[str, ...]]:
    found = text.split()
    return frozenset(tuple(found[i : i + 5]) for i in range(max(len(found) - 4, 1)))


def jaccard(a: frozenset, b: frozenset) -> float:
    return len(a & b) / len(a | b)


def planted(count: int) -> list[str]:
    """Texts of 30 to 300 words, half of them copies of an earlier one with a few words changed."""
    texts: list[list[str]] = []
    for _ in range(count):
        if texts and SOURCE.random() < 0.5:
            copy = list(SOURCE.choice(texts))
            for _ in range(int(SOURCE.random() ** 2 * 0.1 * len(copy))):
                copy[SOURCE.randrange(len(copy))] = f"w{SOURCE.randrange(3000)}"
        else:
            copy = [f"w{SOURCE.randrange(3000)}" for _ in range(SOURCE.randrange(30, 300))]
        texts.append(copy)
    return [" ".join(text) for text in texts]


def test_near_duplicates_by_the_exact_similarity() -> None:
    texts = planted(500)
    sets = [grams(text) for text in texts]
    highest = [max((jaccard(a, b) for b in sets[:i]), default=0.0) for i, a in enumerate(sets)]
    found = repeated(NearDuplicates(NearDedup()), texts, 3)
    surely = [i for i, s in enumerate(highest) if s >= 0.85]
    assert len(surely) > 100
    missed = [i for i in surely if not found[i]]
    assert len(missed) <= 0.02 * len(surely), [highest[i] for i in missed]
    # Nothing is taken for a duplicate that is not similar: 0.7 is estimated from 112 hashes.
    assert all(highest[i] > 0.55 for i, again in enumerate(found) if again)
    assert all(found[i] for i, s in enumerate(highest) if s == 1.0)


def test_the_decision_does_not_depend_on_parts() -> None:
    texts = planted(300)
    step = NearDuplicates(NearDedup())
    first = repeated(step, texts, 1)
    assert sum(first) > 50
    for parts in (2, 7, 300):
        assert repeated(step, texts, parts) == first


def test_without_similarity_a_band_is_enough() -> None:
    texts = planted(300)
    loose = repeated(NearDuplicates(NearDedup(similarity=None, rows=3)), texts)
    strict = repeated(NearDuplicates(NearDedup(similarity=0.9, rows=3)), texts)
    assert sum(loose) > sum(strict) > 0
    assert all(a or not b for a, b in zip(loose, strict, strict=True))


def test_the_estimate_is_that_of_minhash() -> None:
    """Unbiased, with a standard deviation of at most sqrt(s (1 - s) / hashes) per pair."""
    step, errors = NearDuplicates(NearDedup()), []
    for _ in range(60):
        a, b = (word_hashes(" ".join(f"w{i}" for i in range(n, n + 100))) for n in (0, 20))
        offset = np.uint64(SOURCE.getrandbits(63))
        hashes = [ngram_hashes(h + offset, 1) for h in (a, b)]
        found = [np.array(step_signature(step, h)) for h in hashes]
        errors.append((found[0] == found[1]).mean() - 80 / 120)
    assert abs(np.mean(errors)) < 4 * np.sqrt(2 / 9 / 112 / 60)
    assert np.std(errors) < 1.4 * np.sqrt(2 / 9 / 112)


def step_signature(step: NearDuplicates, hashes: np.ndarray) -> list[int]:
    from dtt.data.cleaning.duplicates import _rensa

    edges = np.array([0, len(hashes)], np.uint64)
    return _rensa()(hashes, edges, step.hashes, 1).to_rows()[0]


def test_texts_without_words_are_like_nothing() -> None:
    texts = ["...", "...", "", "short one", "Short, one!", "short"]
    assert repeated(NearDuplicates(NearDedup()), texts) == [0, 0, 0, 0, 1, 0]


def test_groups_are_connected_components() -> None:
    for count, links in ((1, 0), (50, 30), (400, 390), (400, 1000)):
        pairs = [(SOURCE.randrange(count), SOURCE.randrange(count)) for _ in range(links)]
        label = list(range(count))
        for a, b in pairs:  # merge two groups, in the plainest way
            low, high = sorted((label[a], label[b]))
            label = [low if x == high else x for x in label]
        found = _first_of_each_group(count, np.array(pairs, np.int64).reshape(-1, 2))
        assert found.tolist() == label
    chain = np.stack([np.arange(999), np.arange(1, 1000)], 1)
    assert not _first_of_each_group(1000, chain[::-1]).any()


def test_a_missing_or_wrong_package_is_one_line(monkeypatch) -> None:
    import rensa

    monkeypatch.setattr("dtt.data.cleaning.duplicates.NearDuplicates.ALGORITHM", 99)
    with pytest.raises(DataError, match=r'needs version 99 .*pip install "rensa'):
        NearDuplicates(NearDedup()).signature("some text")
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(DataError, match=r'package rensa; pip install "dtt\[data\]"'):
        NearDuplicates(NearDedup()).signature("some text")
    assert rensa
