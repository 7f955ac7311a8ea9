"""Windows: the rows of `context` tokens that a model sees, cut from a stream of documents."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dtt.data.order import mix
from dtt.data.shards import TokenStream

I64 = NDArray[np.int64]
IGNORED = -1
"""A target that is no token: padding."""


class Windows(Protocol):
    """A division of a stream into windows, each an input of at most `context` tokens."""

    stream: TokenStream
    context: int
    count: int
    """Windows in an epoch."""
    isolate: int | None
    """The end-of-text token, if documents in a window must not see each other."""

    def starts(self, windows: I64, epoch: int) -> I64:
        """Stream positions where windows begin in an epoch: what identifies them."""

    def sizes(self, windows: I64) -> I64:
        """Targets in each window; the rest of it is padding."""

    def fill(self, window: int, epoch: int, tokens: I64, targets: I64) -> list[int]:
        """Write a window into two rows [context], which come as zeros and IGNORED.

        Returns where its pieces begin in the row: text before a piece is not of its document.
        """


class ContiguousWindows:
    """Windows that follow each other through the stream, whatever document they are of.

    Nothing is padded. The division of each epoch but the first is shifted, so that later epochs do
    not see the same windows again.
    """

    def __init__(
        self, stream: TokenStream, context: int, seed: int, isolate: int | None = None
    ) -> None:
        self.stream, self.context, self.isolate, self._seed = stream, context, isolate, seed
        self._targets = len(stream) - 1
        self.count = self._targets // context
        if self.count > 1:
            self.count = (self._targets - context + 1) // context

    def starts(self, windows: I64, epoch: int) -> I64:
        return windows * self.context + self._shift(epoch)

    def _shift(self, epoch: int) -> int:
        room = min(self._targets - self.count * self.context, self.context - 1)
        return mix(self._seed, 2, epoch) % (room + 1) if epoch else 0

    def sizes(self, windows: I64) -> I64:
        return np.full(len(windows), self.context)

    def fill(self, window: int, epoch: int, tokens: I64, targets: I64) -> list[int]:
        row = self.stream.read(window * self.context + self._shift(epoch), self.context + 1)
        tokens[:], targets[:] = row[:-1], row[1:]
        return [0]


def document_positions(tokens: I64, size: int, pieces: list[int], end: int) -> I64:
    """Return the place of each token of a row [context] in its document, 0 from `size` on, where
    padding is.

    A document begins at an end-of-text token, which is how every document begins, and at a piece
    of one. With these positions a model that isolates documents needs nothing else: token i sees
    the tokens from i - positions[i] on.
    """
    first = tokens == end
    first[pieces] = True
    first[size:] = True
    columns: NDArray[Any] = np.arange(len(tokens))
    return columns - np.maximum.accumulate(np.where(first, columns, 0))
