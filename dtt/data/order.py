"""The order of samples, as arithmetic: no list of indices, no state.

The order of an epoch is a keyed bijection of [0, n): a Feistel network over the next power of two,
walked until it lands inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
Any position is computed alone, so resuming is a seek and ranks need not talk.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
ROUNDS = 6
BLOCK = 4096
"""Samples whose places are computed at once, and kept for the next steps."""
_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """Return a 64-bit hash of integers (chained splitmix64 finalisers, Steele et al. 2014)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def permute(index: U64, size: int, key: int) -> U64:
    """Return the images of `index`, in [0, size), under the bijection of [0, size) of `key`."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = [np.uint64(mix(key, r)) for r in range(ROUNDS)]
    out = _feistel(index.astype(np.uint64), half, keys)
    while (outside := out >= size).any():
        out[outside] = _feistel(out[outside], half, keys)
    return out


def _feistel(values: U64, half: int, keys: list[np.uint64]) -> U64:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_hash(right ^ key) & mask)
    return (left << bits) | right


def _hash(values: U64) -> U64:
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


class WindowOrder:
    """Which window of the token stream sample number g of a run is.

    Each epoch divides the stream into `windows` windows of `context` targets and visits every one
    once, in an order of its own; the division of each epoch but the first is shifted, so that later
    epochs do not see the same windows again.
    """

    def __init__(self, stream_length: int, context: int, seed: int) -> None:
        self.context, self.seed = context, seed
        self._targets = stream_length - 1
        self._blocks: dict[int, NDArray[np.int64]] = {}
        self.windows = self._targets // context
        if self.windows > 1:
            self.windows = (self._targets - context + 1) // context

    def starts(self, first: int, count: int) -> NDArray[np.int64]:
        """Return the stream positions where samples [first, first + count) begin."""
        numbers = range(first // BLOCK, (first + count - 1) // BLOCK + 1)
        self._blocks = {n: self._block(n) for n in numbers}
        whole = np.concatenate(list(self._blocks.values()))
        return whole[first - numbers[0] * BLOCK :][:count]

    def _block(self, number: int) -> NDArray[np.int64]:
        # One call for many samples: numpy's overhead on a batch of 12 is that of thousands.
        if number in self._blocks:
            return self._blocks[number]
        return self._compute(number * BLOCK, BLOCK)

    def _compute(self, first: int, count: int) -> NDArray[np.int64]:
        samples = np.arange(first, first + count, dtype=np.uint64)
        epochs = samples // np.uint64(self.windows)
        out = np.empty(count, np.int64)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            inside = samples[mine] - np.uint64(epoch * self.windows)
            window = permute(inside, self.windows, mix(self.seed, 1, epoch))
            out[mine] = window.astype(np.int64) * self.context + self._shift(epoch)
        return out

    def _shift(self, epoch: int) -> int:
        room = min(self._targets - self.windows * self.context, self.context - 1)
        return mix(self.seed, 2, epoch) % (room + 1) if epoch else 0
