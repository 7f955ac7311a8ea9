"""Which elements of a whole tensor a rank has: what divides a model says so with these.

With them a tensor is saved in one layout and loaded in another, counted once in a norm, and
compared with that of one process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Range = tuple[int, int]
Box = tuple[slice, ...]


@dataclass(frozen=True)
class Part:
    """A rank's tensor has along each dim these ranges of the whole tensor, one after the other."""

    shape: tuple[int, ...]
    """Of the whole."""
    ranges: tuple[tuple[Range, ...], ...]
    """By dim."""
    owned: bool = True
    """Whether this rank saves and counts it; others may have a copy."""

    @classmethod
    def all_of(cls, shape: tuple[int, ...], owned: bool = True) -> Part:
        return cls(tuple(shape), tuple(((0, size),) for size in shape), owned)

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(sum(b - a for a, b in ranges) for ranges in self.ranges)

    @property
    def is_all(self) -> bool:
        return self.local_shape == self.shape

    def narrow(self, dim: int, start: int, stop: int) -> Part:
        """Return the part of which a rank has only [start, stop) along one dim of its tensor."""
        kept: list[Range] = []
        before = 0
        for a, b in self.ranges[dim]:
            first, last = max(start - before, 0), min(stop - before, b - a)
            if first < last:
                kept.append((a + first, a + last))
            before += b - a
        return replace(self, ranges=(*self.ranges[:dim], tuple(kept), *self.ranges[dim + 1 :]))

    def take(self, whole: Tensor) -> Tensor:
        """Return a copy of this part of a whole tensor."""
        for dim, ranges in enumerate(self.ranges):
            if ranges != ((0, whole.shape[dim]),):
                pieces = [whole.narrow(dim, a, b - a) for a, b in ranges]
                whole = torch.cat(pieces, dim) if pieces else whole.narrow(dim, 0, 0)
        return whole.clone()

    def boxes(self) -> Iterator[tuple[Box, Box]]:
        """Yield blocks that make up the part: where each is in the whole, and in the rank's."""
        steps = [list(_located(ranges)) for ranges in self.ranges]
        for places in itertools.product(*steps):
            yield tuple(there for there, _ in places), tuple(here for _, here in places)

    def put(self, local: Tensor, whole: Tensor) -> None:
        """Copy a rank's tensor to its place in the whole one."""
        for there, here in self.boxes():
            whole[there] = local[here]


def _located(ranges: tuple[Range, ...]) -> Iterator[tuple[slice, slice]]:
    before = 0
    for a, b in ranges:
        yield slice(a, b), slice(before, before + b - a)
        before += b - a


def share_of(length: int, number: int, index: int) -> Range:
    """Return the index-th of `number` shares of a length, as torch.chunk cuts it: the last ones may
    have less, or nothing."""
    size = math.ceil(length / number)
    return min(index * size, length), min((index + 1) * size, length)
