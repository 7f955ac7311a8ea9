"""Documents, the parts in which they are read, and what a source of them can do."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

PART_BYTES = 1 << 20
"""Text that a worker reads at a time, about, and at least..."""
LARGEST_PART = 64 << 20
MANY_PARTS = 4000
"""...but of a large corpus more, up to LARGEST_PART, so that it does not become ten thousand files
and more: some file systems have a quota for these."""
END = 1 << 62
"""The end of a piece that only reading finds."""
EXPANSION = 4
"""How much larger than its compressed file a text is taken to be."""


def part_bytes(total: int) -> int:
    """Return how much text of a corpus of `total` bytes a part has, about."""
    return max(PART_BYTES, min(LARGEST_PART, total // MANY_PARTS))


@dataclass(frozen=True)
class Document:
    """A text, or with `ends` False a piece of one that goes on in the next part."""

    text: str
    bits: float | None = None
    """Its exact information under the source's distribution, where that is known."""
    ends: bool = True
    key: bytes | None = None
    """In the pieces of a long document: its beginning, which decides the split of them all."""

    @cached_property
    def utf8(self) -> bytes:
        """The text's bytes."""
        return self.text.encode("utf-8", "replace")

    @property
    def identity(self) -> bytes:
        """What decides the split: equal documents have it equal, and so have all pieces of one."""
        return self.utf8 if self.key is None else self.key


@dataclass(frozen=True)
class Piece:
    """Bytes (or rows) [start, stop) of a file; `ends`: its last document ends there."""

    path: str
    start: int
    stop: int
    ends: bool
    share: tuple[float, float] | None = None
    """From where to where of its only row's text, where a tail split cuts the row."""


@dataclass(frozen=True)
class Part:
    """What one worker reads at a time: items [start, stop) of the source, or pieces of files."""

    index: int
    start: int = 0
    stop: int = 0
    pieces: tuple[Piece, ...] = ()
    held_out: bool | None = None
    """Which side of a tail split it is on; None where the split is by document."""


class SourceReader(Protocol):
    """The seam for a new source: four methods and a row in `SOURCES` (docs/extending.md)."""

    bad: Counter[str]
    """Documents left out or repaired so far, by reason; the manifest adds them up."""

    def documents(self) -> int | None:
        """Number of documents, or None when only reading tells."""

    def fingerprint(self) -> dict[str, Any]:
        """What the corpus is: equal fingerprints promise equal documents."""

    def parts(self, tail: float) -> list[Part]:
        """All parts in order. With tail > 0 the last such share of the corpus is `held_out`."""

    def read(self, part: Part) -> Iterator[Document]:
        """The documents of a part, in order."""


class Weighed(NamedTuple):
    """A piece with its size in bytes, about, and its side of a tail split."""

    piece: Piece
    size: int
    held_out: bool | None


def grouped(pieces: Iterable[Weighed], size: int) -> list[Part]:
    """Put neighbouring pieces of one side together to parts of at least `size` bytes."""
    parts: list[Part] = []
    for held_out, neighbours in itertools.groupby(pieces, lambda item: item.held_out):
        group: list[Piece] = []
        weight = 0
        for item in neighbours:
            group.append(item.piece)
            weight += item.size
            if weight >= size:
                parts.append(Part(len(parts), pieces=tuple(group), held_out=held_out))
                group, weight = [], 0
        if group:
            parts.append(Part(len(parts), pieces=tuple(group), held_out=held_out))
    return parts
