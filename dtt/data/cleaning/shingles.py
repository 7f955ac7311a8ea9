"""A text as hashes of n words in a row, for finding texts that have much in common."""

from __future__ import annotations

import hashlib
import re

import numpy as np
from numpy.typing import NDArray

# Kana and ideographs, written without spaces: each counts as a word.
IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(r"\w+")
WORD_OR_IDEOGRAPH = re.compile(rf"[{IDEOGRAPHS}]|[^\W{IDEOGRAPHS}]+")
MULTIPLIER = 0x9E3779B97F4A7C15
KEPT_WORDS, KEPT_LENGTH = 1 << 18, 32
"""Hashes are remembered for so many words (some 40 MB) of at most so many characters."""


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without white space and punctuation."""
    return (WORD if text.isascii() else WORD_OR_IDEOGRAPH).findall(text.lower())


class _WordHashes(dict[str, int]):
    """The 64-bit BLAKE2b hash of a word, remembered."""

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
        value = int.from_bytes(digest, "little")
        if len(self) >= KEPT_WORDS:
            self.clear()
        if len(word) <= KEPT_LENGTH:
            self[word] = value
        return value


_hashes = _WordHashes()


def word_hashes(text: str) -> NDArray[np.uint64]:
    """Return a 64-bit hash for each word of a text, the same in every process."""
    found = words(text)
    return np.fromiter(map(_hashes.__getitem__, found), np.uint64, len(found))


def ngram_hashes(hashes: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Return the hash of every n words in a row; of fewer words, one of all of them.

    A polynomial modulo 2^64 of the words' hashes, then MurmurHash3's finalizer, without which its
    low bits would depend on the low bits of the words only.
    """
    n = min(n, len(hashes))
    if n == 0:
        return hashes
    total = np.zeros(len(hashes) - n + 1, np.uint64)
    for start in range(n):
        total = total * np.uint64(MULTIPLIER) + hashes[start : len(hashes) - n + 1 + start]
    return mixed(total)


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit of each value over all of its bits (MurmurHash3's 64-bit finalizer)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
