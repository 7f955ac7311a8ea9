"""Batches as a pure function of (seed, step, rank), prepared ahead of the step that needs them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dtt.data.ledger import seen
from dtt.data.mixture import Shares
from dtt.data.order import Order, mix, permute
from dtt.data.packing import PackedWindows
from dtt.data.shards import TokenStream
from dtt.data.windows import I64, IGNORED, Windows, document_positions

AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """One rank's share of an optimizer step."""

    tokens: Tensor
    """[sequences, context] int64 inputs."""
    targets: Tensor
    """[sequences, context] int64: the token behind each input, or IGNORED."""
    positions: Tensor | None
    """[sequences, context]: places in documents that do not see each other; None: one text."""
    count: int
    """Targets of the whole step, over all ranks."""
    starts: tuple[int, ...]
    """Where each sequence begins in the token stream of its source: what the step has seen."""
    sources: tuple[int, ...] = ()
    """The source of each sequence."""
    seen: int = 0
    """This rank's part of the step's number in the ledger (dtt.data.ledger)."""


class Loader:
    """Training batches: step s of a run takes samples [s B, (s + 1) B) of the run's order.

    A rank takes a contiguous share, so the samples of a step do not depend on the number of ranks.
    With `pin` batches are in pinned memory, for copies to a GPU that nothing waits for.
    """

    def __init__(
        self,
        sources: Sequence[Windows],
        batch_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        *,
        shares: Shares | None = None,
        pin: bool = False,
    ) -> None:
        """`sources` have one context; `shares` mixes them."""
        self.sources, self.batch_size = list(sources), batch_size
        self.shares = shares or Shares([1.0], [None])
        seeds = [seed if i == 0 else mix(seed, 4, i) for i in range(len(self.sources))]
        self.orders = [Order(s.count, k) for s, k in zip(self.sources, seeds, strict=True)]
        self.context = self.sources[0].context
        self._isolate = any(source.isolate is not None for source in self.sources)
        self._pin = pin
        share = batch_size // ranks
        self._mine = slice(rank * share, (rank + 1) * share)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in which as many windows are seen as there are."""
        return sum(source.count for source in self.sources) / self.batch_size

    def samples(self, step: int) -> tuple[I64, I64, I64]:
        """Return (source, epoch, window) of every sample of a step, over all ranks."""
        sources, first = self.shares.assign(step * self.batch_size, self.batch_size)
        epochs, windows = np.empty_like(sources), np.empty_like(sources)
        for index, order in enumerate(self.orders):
            mine = sources == index
            if count := int(mine.sum()):
                epochs[mine], windows[mine] = order.places(first[index], count)
        return sources, epochs, windows

    def batch(self, step: int) -> Batch:
        """Return this rank's batch of optimizer step `step` (0-based)."""
        sources, epochs, windows = self.samples(step)
        count = sum(
            int(source.sizes(windows[sources == index]).sum())
            for index, source in enumerate(self.sources)
        )
        mine = zip(
            sources[self._mine].tolist(),
            epochs[self._mine].tolist(),
            windows[self._mine].tolist(),
            strict=True,
        )
        rows = [(self.sources[source], window, epoch) for source, epoch, window in mine]
        starts = [int(s.starts(np.array([window]), epoch)[0]) for s, window, epoch in rows]
        names = sources[self._mine].tolist()
        batch = assemble(
            rows, starts, count=count, sources=names, isolate=self._isolate, pin=self._pin
        )
        first = step * self.batch_size + self._mine.start
        return replace(batch, seen=seen(first, names, starts))

    def iter_from(self, step: int) -> Generator[Batch, None, None]:
        """Yield the batches of steps `step`, `step` + 1, ... without end; a thread reads ahead."""
        with ThreadPoolExecutor(1, "dtt-loader") as pool:
            ahead: list[Future[Batch]] = [pool.submit(self.batch, step + i) for i in range(AHEAD)]
            try:
                while True:
                    yield ahead.pop(0).result()
                    step += 1
                    ahead.append(pool.submit(self.batch, step + AHEAD - 1))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def assemble(
    rows: Sequence[tuple[Windows, int, int]],
    starts: Sequence[int],
    *,
    count: int,
    isolate: bool,
    sources: Sequence[int] = (),
    pin: bool = False,
) -> Batch:
    """Read (windows, window, epoch) rows into a batch; with `isolate` it has positions."""
    context = rows[0][0].context
    tokens = np.zeros((len(rows), context), np.int64)
    targets = np.full((len(rows), context), IGNORED, np.int64)
    positions = np.tile(np.arange(context), (len(rows), 1)) if isolate else None
    for row, (windows, window, epoch) in enumerate(rows):
        pieces = windows.fill(window, epoch, tokens[row], targets[row])
        if positions is not None and windows.isolate is not None:
            size = int((targets[row] != IGNORED).sum())
            positions[row] = document_positions(tokens[row], size, pieces, windows.isolate)

    def tensor(array: I64) -> Tensor:
        made = torch.from_numpy(array)
        return made.pin_memory() if pin else made

    places = None if positions is None else tensor(positions)
    return Batch(tensor(tokens), tensor(targets), places, count, tuple(starts), tuple(sources))


def overlapping_batches(
    stream: TokenStream,
    context: int,
    batch_size: int,
    stride: int | None = None,
    max_tokens: int | None = None,
    isolate: int | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Batch]:
    """Yield every target of the stream exactly once, in order, in windows of `context` tokens.

    With `stride` below `context` windows overlap and only the last `stride` targets of each window
    count (all of the first one's), so that each target has at least context - stride tokens before
    it. Ranks take every ranks-th batch.
    """
    stride = stride or context
    total = min(len(stream) - 1, max_tokens or len(stream))
    # Window i predicts targets (end of window i-1, end of window i]; ends are context + i stride.
    windows = 1 + max(0, -(-(total - context) // stride))
    for first in range(rank * batch_size, windows, ranks * batch_size):
        starts = [w * stride for w in range(first, min(first + batch_size, windows))]
        tokens = np.zeros((len(starts), context), np.int64)
        targets = np.full((len(starts), context), IGNORED, np.int64)
        positions = None if isolate is None else np.zeros_like(tokens)
        for row, start in enumerate(starts):
            piece = stream.read(start, min(context, total - start) + 1)
            tokens[row, : len(piece) - 1] = piece[:-1]
            fresh = context - stride if start else 0
            targets[row, fresh : len(piece) - 1] = piece[1 + fresh :]
            if positions is not None and isolate is not None:
                positions[row] = document_positions(tokens[row], len(piece) - 1, [0], isolate)
        yield Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(targets),
            None if positions is None else torch.from_numpy(positions),
            int((targets != IGNORED).sum()),
            tuple(starts),
        )


def packed_batches(
    windows: PackedWindows,
    batch_size: int,
    max_tokens: int | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Batch]:
    """Yield every target exactly once, in windows of whole documents, in a fixed mixed order.

    With `max_tokens` it ends with the window that reaches so many. Ranks take every ranks-th batch.
    """
    count = windows.count
    if max_tokens is not None:  # no more than these are looked at, and a margin for padding
        count = min(count, 2 * max_tokens // windows.context + 1000)
    order = permute(np.arange(count, dtype=np.uint64), windows.count, 0).astype(np.int64)
    if max_tokens is not None:
        enough = np.searchsorted(np.cumsum(windows.sizes(order)), max_tokens)
        order = order[: int(enough) + 1]
    for first in range(rank * batch_size, len(order), ranks * batch_size):
        mine = order[first : first + batch_size]
        yield assemble(
            [(windows, window, 0) for window in mine.tolist()],
            windows.starts(mine, 0).tolist(),
            count=int(windows.sizes(mine).sum()),
            isolate=windows.isolate is not None,
        )
