"""Which samples each step of a run saw, from its settings and its corpora alone.

The order is a pure function, so it can be computed again, and what a run recorded while it trained
(`dtt.data.ledger`) can be compared with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtt.data.ledger import seen
from dtt.data.loader import Loader

I64 = NDArray[np.int64]
RECORDED = "samples"
"""The field of a step's line in metrics.jsonl that holds its number of the ledger."""


@dataclass(frozen=True)
class Samples:
    """The samples of a step, in the order of the global batch."""

    sources: I64
    epochs: I64
    windows: I64
    starts: I64
    """Where each begins in the token stream of its source."""


def samples_of(loader: Loader, step: int) -> Samples:
    """Return what optimizer step `step` (0-based) sees, over all ranks."""
    sources, epochs, windows = loader.samples(step)
    starts = np.empty_like(windows)
    for index, source in enumerate(loader.sources):
        for epoch in np.unique(epochs[sources == index]).tolist():
            mine = (sources == index) & (epochs == epoch)
            starts[mine] = source.starts(windows[mine], epoch)
    return Samples(sources, epochs, windows, starts)


def ledger_number(loader: Loader, step: int, samples: Samples) -> int:
    """Return what all ranks together should have recorded for a step (0-based)."""
    first = step * loader.batch_size
    return seen(first, samples.sources.tolist(), samples.starts.tolist())


class Epochs:
    """Counts how often the windows of a source were seen, one epoch after another."""

    def __init__(self, windows: int) -> None:
        self.windows, self._epoch = windows, 0
        self._times = np.zeros(windows, np.uint8)
        self.twice: list[tuple[int, int]] = []
        """(epoch, window) of those seen again in the same epoch."""
        self.missed: list[tuple[int, int]] = []
        """(epoch, windows left out) of epochs that ended."""

    def add(self, epochs: I64, windows: I64) -> None:
        """Count samples, in the order in which they were seen."""
        for epoch in np.unique(epochs).tolist():
            while epoch > self._epoch:
                if left_out := self.windows - self._seen():
                    self.missed.append((self._epoch, left_out))
                self._times[:] = 0
                self._epoch += 1
            mine = windows[epochs == epoch]
            np.add.at(self._times, mine, 1)
            again = np.unique(mine[self._times[mine] > 1])
            self.twice += [(epoch, window) for window in again.tolist()]

    @property
    def progress(self) -> tuple[int, int]:
        """Epochs that ended, and windows seen of the one that goes on."""
        ended = self._seen() == self.windows
        return self._epoch + ended, 0 if ended else self._seen()

    def _seen(self) -> int:
        return int(np.count_nonzero(self._times))


@dataclass
class Audit:
    """What was found in a run's steps."""

    steps: int = 0
    first: int = 0
    """The first step of the run (above 1 if it began from another run's checkpoint)."""
    last: int = 0
    samples: int = 0
    recorded: int = 0
    """Steps that recorded what they saw..."""
    differing: list[int] = field(default_factory=list)
    """...and those among them that saw something else than they should."""
    missing: list[tuple[int, int]] = field(default_factory=list)
    """(first, last) of steps without a line, between the run's first and last."""
    twice: list[int] = field(default_factory=list)
    """Steps with two lines."""
    epochs: list[Epochs] = field(default_factory=list)
    """By source."""

    @property
    def faults(self) -> list[str]:
        """What is wrong, a line each; none: every sample was seen once per epoch."""
        found = [
            f"steps {a} to {b} have no line" if b > a else f"step {a} has no line"
            for a, b in self.missing
        ]
        found += [f"step {step} has two lines" for step in self.twice]
        found += [f"step {step} saw other samples than the order has" for step in self.differing]
        for source, epochs in enumerate(self.epochs):
            found += [
                f"source {source}: window {window} was seen twice in epoch {epoch}"
                for epoch, window in epochs.twice
            ]
            found += [
                f"source {source}: epoch {epoch} left out {count:,} windows"
                for epoch, count in epochs.missed
            ]
        return found


def audit(loader: Loader, rows: Iterable[dict[str, Any]]) -> Audit:
    """Compare the lines of a run's metrics.jsonl with the order of its samples.

    Steps before the first line are those of the run that this one went on from: they count as seen.
    """
    result = Audit(epochs=[Epochs(source.count) for source in loader.sources])
    for row in rows:
        if "loss" not in row:
            continue
        step = row["step"]
        if not result.steps:
            result.first = step
            for before in range(1, step):
                _count(result, samples_of(loader, before - 1))
        elif step <= result.last:
            result.twice.append(step)
            continue
        elif step > result.last + 1:
            result.missing.append((result.last + 1, step - 1))
        samples = samples_of(loader, step - 1)
        _count(result, samples)
        result.steps, result.last = result.steps + 1, step
        result.samples += len(samples.windows)
        if (recorded := row.get(RECORDED)) is not None:
            result.recorded += 1
            if recorded != ledger_number(loader, step - 1, samples):
                result.differing.append(step)
    return result


def _count(result: Audit, samples: Samples) -> None:
    for source, epochs in enumerate(result.epochs):
        mine = samples.sources == source
        epochs.add(samples.epochs[mine], samples.windows[mine])


def ledger_lines(loader: Loader, steps: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Yield what each step (from 1) sees: sources, epochs, windows and starts of its samples."""
    for step in steps:
        samples = samples_of(loader, step - 1)
        yield {
            "step": step,
            RECORDED: ledger_number(loader, step - 1, samples),
            **{
                name: getattr(samples, name).tolist()
                for name in ("sources", "epochs", "windows", "starts")
            },
        }
