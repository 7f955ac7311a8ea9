"""Where a tail split goes through a file of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import IO

from dtt.data.documents import END, Document, Piece, Weighed
from dtt.data.reading.spans import SEARCHED, Separator


@dataclass(frozen=True)
class Border:
    """The row [low, high) that a tail split meets, in bytes or in numbers of rows.

    It is all on the side of training; with `share` that share of its text is, so that one long row
    does not leave a side without text.
    """

    low: int
    high: int
    share: float | None = None

    @property
    def edges(self) -> set[int]:
        """What no piece crosses."""
        return {self.high} if self.share is None else {self.low, self.high}

    def sides(self, piece: Piece, size: int) -> Iterator[Weighed]:
        """A piece that does not cross the border, or both sides of the row that is cut."""
        if self.share is None or piece.start != self.low:
            yield Weighed(piece, size, piece.start >= self.high)
            return
        yield Weighed(replace(piece, share=(0.0, self.share)), size, False)
        yield Weighed(replace(piece, share=(self.share, 1.0)), size, True)


BEHIND = Border(END, END)
"""The whole file is before the border."""
BEFORE = Border(0, 0)
"""The whole file is behind it."""


def border_of_lines(file: IO[bytes], place: int, line: Separator, most: float) -> Border:
    """The border in the line that has the byte `place`; at its end, if that is `most` bytes off."""
    high = line.after(file, place)
    if high - place <= most:
        return Border(high, high)
    low = place
    while low:
        start = max(low - SEARCHED, 0)
        file.seek(start)
        found = file.read(low - start).rfind(b"\n")
        if found >= 0:
            low = start + found + 1
            break
        low = start
    return Border(low, high, (place - low) / (high - low))


def border_of_stream(blocks: Iterable[bytes], place: int, most: float) -> Border:
    """As `border_of_lines`, for bytes that come in blocks."""
    low = offset = 0
    for block in blocks:
        inside = max(place - offset, 0)
        before, behind = block.rfind(b"\n", 0, inside), block.find(b"\n", inside)
        if before >= 0:
            low = offset + before + 1
        if behind >= 0:
            offset += behind + 1
            break
        offset += len(block)
    if offset - place <= most:
        return Border(offset, offset)
    return Border(low, offset, (place - low) / (offset - low))


def border_of_table(rows: int, place: float, most: float) -> Border:
    """The border at `place` of so many rows; between two of them, if that is `most` rows off."""
    near, low = round(place), min(int(place), rows - 1)
    if abs(near - place) <= most or place == low:
        return Border(near, near)
    return Border(low, low + 1, place - low)


def share_of(documents: Iterable[Document], low: int, high: int) -> Iterator[Document]:
    """The characters [low, high) of one document, which may come in pieces."""
    offset = 0
    for document in documents:
        text = document.text[max(low - offset, 0) : max(high - offset, 0)]
        offset += len(document.text)
        if text or (document.key is not None and document.ends):
            yield replace(document, text=text)
