"""Mixtures: which source each sample of a run comes from.

Shares are exact: of the first n samples a source with share w has w n, to within one sample a
block, and within a block its samples are spread evenly. Any place is computed alone, as in the
order within a source, so resuming and changing the number of ranks need no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from dtt.data.windows import I64

BLOCK = 4096
"""Samples whose sources are found at once."""
ONE = 1 << 60
"""A share of everything: shares are integers, so that every machine computes the same ones."""


@dataclass(frozen=True)
class _Stage:
    """Blocks from `first` on in which the same sources take part, in the same shares."""

    first: int
    before: tuple[int, ...]
    """Samples of each source in the blocks before."""
    parts: tuple[int, ...] = ()
    """What each source takes, of ONE, of what the sources before it have left."""
    exact: tuple[int, ...] = ()
    """Instead of shares: the samples of each source, in the one block of this stage..."""
    progress: tuple[tuple[float, tuple[float, ...]], ...] = ()
    """...and (place in the block, samples of each source up to there) where a source ends."""

    def counts(self, blocks: int) -> tuple[int, ...]:
        """Return the samples of each source in the first `blocks` blocks of the stage."""
        if self.exact:
            return self.exact if blocks else (0,) * len(self.exact)
        # Taken from a rest that only grows, each source's count only grows too.
        rest, counts = blocks * BLOCK, []
        for part in self.parts:
            counts.append(part * rest // ONE)
            rest -= counts[-1]
        return tuple(counts)


class Shares:
    """Sources of samples 0, 1, ... by weight; a source with a limit stops there.

    Once a source has given all it may, the others share its part in proportion.
    """

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None]) -> None:
        """`weights` are positive; `limits` are the most samples of each source, None for no end."""
        self._limits = [2**62 if limit is None else limit for limit in limits]
        self.total = None if None in limits else sum(self._limits)
        """Samples there are at all; None if without end."""
        self._stages = list(self._plan(weights))
        self._blocks: dict[int, tuple[I64, list[int]]] = {}

    def assign(self, first: int, count: int) -> tuple[I64, list[int]]:
        """Return the sources [count] of samples from `first` on, and the number that the first
        sample of each source among them has within that source."""
        numbers = range(first // BLOCK, (first + count - 1) // BLOCK + 1)
        self._blocks = {n: self._blocks.get(n) or self._block(n) for n in numbers}
        sources = np.concatenate([block[0] for block in self._blocks.values()])
        skipped = first - numbers[0] * BLOCK
        before = np.bincount(sources[:skipped], minlength=len(self._limits))
        start = [int(a + b) for a, b in zip(self._blocks[numbers[0]][1], before, strict=True)]
        return sources[skipped : skipped + count], start

    def _block(self, number: int) -> tuple[I64, list[int]]:
        stage = [s for s in self._stages if s.first <= number][-1]
        low, high = stage.counts(number - stage.first), stage.counts(number - stage.first + 1)
        start = [a + b for a, b in zip(stage.before, low, strict=True)]
        counts = [b - a for a, b in zip(low, high, strict=True)]
        places = [_places(stage, source, n) for source, n in enumerate(counts)]
        sources = np.repeat(np.arange(len(counts)), counts)
        return sources[np.argsort(np.concatenate(places), kind="stable")], start

    def _plan(self, weights: Sequence[float]) -> list[_Stage]:
        """Find the blocks in which sources reach their limits."""
        stages: list[_Stage] = []
        first, before = 0, (0,) * len(weights)
        open_weights = list(weights)
        while any(open_weights):
            stage = _Stage(first, before, _parts(open_weights))
            if blocks := self._blocks_until_a_limit(stage):
                stages.append(stage)
                if blocks < 0:
                    return stages
                first, before = first + blocks, _add(before, stage.counts(blocks))
            exact, progress = self._last_samples(open_weights, before)
            stages.append(_Stage(first, before, exact=exact, progress=progress))
            first, before = first + 1, _add(before, exact)
            for source, limit in enumerate(self._limits):
                if before[source] >= limit:
                    open_weights[source] = 0.0
        stages.append(_Stage(first, before, exact=(0,) * len(weights)))
        return stages

    def _blocks_until_a_limit(self, stage: _Stage) -> int:
        """Return the whole blocks of a stage in which no source passes its limit; -1: all."""

        def within(blocks: int) -> bool:
            counts = _add(stage.before, stage.counts(blocks))
            return all(n <= limit for n, limit in zip(counts, self._limits, strict=True))

        low, high = 0, 1
        while within(high):
            if high > 2**48:
                return -1
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if within(middle) else (low, middle)
        return low

    def _last_samples(
        self, weights: Sequence[float], before: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[tuple[float, tuple[float, ...]], ...]]:
        """Share one block in which sources reach their limits, as if samples were a fluid; return
        the samples of each and how they add up."""
        left = np.array([limit - n for limit, n in zip(self._limits, before, strict=True)], float)
        live = np.where(left > 0, np.array(weights, float), 0.0)
        given, place, progress = np.zeros(len(left)), 0.0, [(0.0, (0.0,) * len(left))]
        while place < 1 and live.any():
            rates = live / live.sum() * BLOCK
            until = np.divide(left - given, rates, out=np.full(len(left), 2.0), where=rates > 0)
            step = min(float(until.min()), 1 - place)
            given, place = np.minimum(given + rates * step, left), place + step
            live[(until <= step) | (given >= left)] = 0.0
            progress.append((place, tuple(given.tolist())))
        whole = np.floor(given + 1e-6).astype(int)
        rest = round(float(given.sum())) - int(whole.sum())
        whole[np.argsort(whole - given, kind="stable")[:rest]] += 1
        return tuple(whole.tolist()), tuple(progress)


def _places(stage: _Stage, source: int, count: int) -> NDArray[np.float64]:
    """Return where in a block the samples of a source belong, from 0 to 1."""
    middles = (np.arange(count) + 0.5) / max(count, 1)
    if not stage.progress:
        return middles
    places, given = zip(*stage.progress, strict=True)
    amounts = np.array([row[source] for row in given])
    # Up to where the source ends: beyond, the amount stays and has no place of its own.
    last = int(np.argmax(amounts >= amounts[-1])) + 1
    return np.interp(middles * amounts[-1], amounts[:last], places[:last])


def _parts(weights: Sequence[float]) -> tuple[int, ...]:
    """Return each weight's part, of ONE, of itself and all weights behind it; the last has all.

    In rational numbers: a sum of floats is not the same in every version of Python.
    """
    exact = [Fraction(weight) for weight in weights]
    last = max(i for i, weight in enumerate(exact) if weight)
    return tuple(
        ONE if i == last else int(weight * ONE / sum(exact[i:])) if weight else 0
        for i, weight in enumerate(exact)
    )


def _add(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))
