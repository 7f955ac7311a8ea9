"""Batches as a pure function of (seed, step, rank), prepared ahead of the step that needs them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dtt.data.order import WindowOrder
from dtt.data.shards import TokenStream
from dtt.errors import DataError

AHEAD = 2
IGNORED = -1
"""A target that is no token: the padding of an evaluation's last window."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of an optimizer step."""

    tokens: Tensor
    """[sequences, context] int64 inputs."""
    targets: Tensor
    """[sequences, context] int64: the token behind each input, or IGNORED."""
    starts: tuple[int, ...]
    """Where each sequence begins in the token stream: what the step has seen."""


class Loader:
    """Training batches: step s of a run takes samples [s B, (s + 1) B) of the run's order.

    A rank takes a contiguous share, so the samples of a step do not depend on the number of ranks.
    With `pin` batches are in pinned memory, for copies to a GPU that nothing waits for.
    """

    def __init__(
        self,
        stream: TokenStream,
        context: int,
        batch_size: int,
        seed: int,
        rank: int,
        ranks: int,
        pin: bool = False,
    ) -> None:
        have, need = len(stream), context + 1
        if have < need:
            raise DataError(
                f"the training text has {have} tokens, one window needs {need} "
                f"(model.context {context} + 1)",
                f"give more text, a model.context below {have}, or data.repeat",
            )
        self.order = WindowOrder(len(stream), context, seed)
        self.stream, self.context, self.batch_size = stream, context, batch_size
        self._share = batch_size // ranks
        self._pin = pin
        self._first = rank * self._share

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in one pass over the text."""
        return self.order.windows / self.batch_size

    def batch(self, step: int) -> Batch:
        """Return this rank's batch of optimizer step `step` (0-based)."""
        starts = self.order.starts(step * self.batch_size + self._first, self._share)
        rows = np.stack([self.stream.read(start, self.context + 1) for start in starts.tolist()])
        both = torch.from_numpy(rows)
        if self._pin:
            both = both.pin_memory()
        return Batch(both[:, :-1], both[:, 1:], tuple(starts.tolist()))

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


def evaluation_batches(
    stream: TokenStream,
    context: int,
    batch_size: int,
    *,
    stride: int | None = None,
    max_tokens: int | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Batch]:
    """Yield every target of the stream exactly once, in order, in windows of `context` tokens.

    With `stride` below `context` windows overlap and only the last `stride` targets of each window
    count (all of the first one's), so that each target has at least context - stride tokens before
    it. Ranks take every ranks-th batch.
    """
    stride = stride or context
    targets = min(len(stream) - 1, max_tokens or len(stream))
    # Window i predicts targets (end of window i-1, end of window i]; ends are context + i stride.
    count = 1 + max(0, -(-(targets - context) // stride))
    for first in range(rank * batch_size, count, ranks * batch_size):
        windows = range(first, min(first + batch_size, count))
        tokens = np.zeros((len(windows), context), np.int64)
        wanted = np.full((len(windows), context), IGNORED, np.int64)
        for row, window in enumerate(windows):
            start = window * stride
            piece = stream.read(start, min(context, targets - start) + 1)
            tokens[row, : len(piece) - 1] = piece[:-1]
            fresh = context - stride if window else 0
            wanted[row, fresh : len(piece) - 1] = piece[1 + fresh :]
        yield Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(wanted),
            tuple(w * stride for w in windows),
        )
