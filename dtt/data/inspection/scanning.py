"""Reading much of a split without keeping it in memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dtt.data.preparation.prepare import Corpus

RELEASE = 128 << 20
"""Bytes that may have become resident before the memory maps are given up."""
PAGES = 64 << 10
"""Bytes that one read makes resident at least: the kernel maps pages around the one wanted."""


class Scan:
    """The token stream of a split, for readers that go through all of it.

    Pages of a memory map that were read count as the process's memory until the map is given up,
    which this does now and then.
    """

    def __init__(self, corpus: Corpus, split: str) -> None:
        self._corpus, self._split = corpus, split
        self._stream = corpus.stream(split)
        self._resident = 0

    def __len__(self) -> int:
        return len(self._stream)

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Return tokens [start, start + length), fewer at the end of the stream."""
        if self._resident > RELEASE:
            self._stream, self._resident = self._corpus.stream(self._split), 0
        self._resident += PAGES + 4 * length
        return self._stream.read(start, length)
