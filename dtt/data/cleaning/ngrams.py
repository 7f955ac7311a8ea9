"""How much of a text its repeated n-grams make up, exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


class RepeatedNgrams:
    """All n-grams of a text, of which some occur more than once."""

    def __init__(self, n: int, codes: Numbers, counts: Numbers, ends: Numbers) -> None:
        self.n, self._codes, self._counts = n, codes, counts
        self._lengths = ends[n:] - ends[:-n]

    def top(self) -> int:
        """Characters of the commonest n-gram, spaces included, times how often it occurs."""
        most = self._counts.max()
        longest = self._lengths[self._counts[self._codes] == most].max()
        return int(most * (longest + self.n - 1))

    def repeated(self) -> int:
        """Characters of n-grams that were there before, none counted twice, without spaces."""
        codes, lengths = self._codes.tolist(), self._lengths.tolist()
        seen: set[int] = set()
        characters = place = 0
        while place < len(codes):
            if codes[place] in seen:
                characters += lengths[place]
                place += self.n
            else:
                seen.add(codes[place])
                place += 1
        return characters


def repeated_ngrams(words: Sequence[str], longest: int) -> Iterator[RepeatedNgrams]:
    """Yield the n-grams of a text for n from 1 to `longest`, while any occurs more than once."""
    numbers: dict[str, int] = {}
    single = np.array([numbers.setdefault(word, len(numbers)) for word in words], np.int64)
    ends = np.cumsum([0, *map(len, words)])
    codes, different = single, len(numbers)
    for n in range(1, longest + 1):
        if n > 1:
            # An n-gram is its first n - 1 words and its last one: numbered anew, this stays small.
            pairs = codes[:-1] * len(numbers) + single[n - 1 :]
            _, codes = np.unique(pairs, return_inverse=True)
            different = int(codes.max(initial=-1)) + 1
        if different == len(codes):
            return  # and no longer one can occur twice
        yield RepeatedNgrams(n, codes, np.bincount(codes), ends)
