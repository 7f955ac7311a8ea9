"""The order of samples, as arithmetic: no list of indices, no state.

The order of an epoch is a keyed bijection of [0, n): a Feistel network over the next power of two,
walked until it lands inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
Any position is computed alone, so resuming is a seek and ranks need not talk.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
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


class Order:
    """Which of `size` items sample number g of a run is: every epoch visits each item once, in an
    order of its own."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        # Not many epochs of a tiny corpus at once: each is a call of its own.
        self._block_size = min(BLOCK, max(64, size))
        self._blocks: dict[int, tuple[I64, I64]] = {}

    def places(self, first: int, count: int) -> tuple[I64, I64]:
        """Return the epochs and the items of samples [first, first + count)."""
        numbers = range(first // self._block_size, (first + count - 1) // self._block_size + 1)
        self._blocks = {n: self._block(n) for n in numbers}
        inside = slice(
            first - numbers[0] * self._block_size, first - numbers[0] * self._block_size + count
        )
        epochs, items = zip(*self._blocks.values(), strict=True)
        return np.concatenate(epochs)[inside], np.concatenate(items)[inside]

    def _block(self, number: int) -> tuple[I64, I64]:
        # One call for many samples: numpy's overhead on a batch of 12 is that of thousands.
        if number in self._blocks:
            return self._blocks[number]
        samples = np.arange(
            number * self._block_size, (number + 1) * self._block_size, dtype=np.uint64
        )
        epochs = samples // np.uint64(self.size)
        items = np.empty(self._block_size, np.int64)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            inside = samples[mine] - np.uint64(epoch * self.size)
            items[mine] = permute(inside, self.size, mix(self.seed, 1, epoch)).astype(np.int64)
        return epochs.astype(np.int64), items
