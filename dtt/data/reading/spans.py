"""Cutting bytes into documents: at a separator, and long ones into pieces.

A file that can be entered anywhere is divided into parts without being read whole; a part is read
as a stream, so memory does not grow with the length of a line or a document.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import IO

LONGEST = 8 << 20
"""Bytes of a document that are held at a time; a longer one is read in pieces of this size."""
KEY_BYTES = 1 << 16
"""So much of the beginning of a document read in pieces decides its split."""
SEARCHED = 1 << 16
"""Bytes that are searched for a good place to cut."""


@dataclass(frozen=True)
class Separator:
    """What stands between documents; a line feed in it also matches CR LF."""

    text: bytes

    @cached_property
    def longest(self) -> int:
        """The most bytes of a match."""
        return len(self.text) + self.text.count(b"\n")

    @cached_property
    def _pattern(self) -> re.Pattern[bytes]:
        return re.compile(re.escape(self.text).replace(b"\\\n", b"\r?\n"))

    def split(self, data: bytes) -> list[tuple[int, int]]:
        """The places of the documents in `data`; the last one may go on behind it."""
        if b"\n" in self.text and b"\r" in data:
            marks = [match.span() for match in self._pattern.finditer(data)]
        else:
            marks, at, size = [], data.find(self.text), len(self.text)
            while at >= 0:
                marks.append((at, at + size))
                at = data.find(self.text, at + size)
        starts = [0, *(stop for _, stop in marks)]
        return list(zip(starts, [*(start for start, _ in marks), len(data)], strict=True))

    @cached_property
    def _overlapping(self) -> re.Pattern[bytes]:
        return re.compile(b"(?=(" + self._pattern.pattern + b"))")

    def after(self, file: IO[bytes], start: int) -> int:
        """Offset just behind the first separator that begins at or after `start`, else the end.

        One that overlaps an earlier one (in three line feeds) does not count: whoever splits the
        whole file does not see it.
        """
        offset = max(start - self.longest + 1, 0)
        file.seek(offset)
        data, taken = b"", 0
        while block := file.read(SEARCHED):
            data += block
            for match in self._overlapping.finditer(data):
                if offset + match.start() >= max(start, taken):
                    return offset + match.end(1)
                taken = max(taken, offset + match.end(1))
            kept = min(self.longest - 1, len(data))
            offset += len(data) - kept
            data = data[len(data) - kept :]
        return offset + len(data)


@dataclass(frozen=True)
class Span:
    """Bytes of a document: all of it, or a piece where `begins` or `ends` is False."""

    raw: bytes
    offset: int
    begins: bool = True
    ends: bool = True


def spans(
    blocks: Iterable[bytes], separator: Separator | None, offset: int, longest: int, utf8: bool
) -> Iterator[Span]:
    """Yield the documents of a stream that begins at `offset`, in order, the empty ones too.

    Without a separator the stream is one document. What is longer than `longest` bytes comes in
    pieces, cut at the end of a line or word where one is near. The result does not depend on how
    the stream is divided into blocks.
    """
    data, begins = b"", True
    margin = separator.longest if separator else 1
    for block in blocks:
        data += block
        places = separator.split(data) if separator else [(0, len(data))]
        for start, stop in places[:-1]:
            yield from _pieces(data[start:stop], offset + start, begins, True, longest, utf8)
            begins = True
        rest = places[-1][0]
        offset, data = offset + rest, data[rest:]
        while len(data) >= longest + margin:
            cut = good_cut(data, longest, utf8)
            yield Span(data[:cut], offset, begins, False)
            offset, data, begins = offset + cut, data[cut:], False
    yield from _pieces(data, offset, begins, True, longest, utf8)


def _pieces(
    data: bytes, offset: int, begins: bool, ends: bool, longest: int, utf8: bool
) -> Iterator[Span]:
    while len(data) > longest:
        cut = good_cut(data, longest, utf8)
        yield Span(data[:cut], offset, begins, False)
        offset, data, begins = offset + cut, data[cut:], False
    yield Span(data, offset, begins, ends)


def good_cut(data: bytes, limit: int, utf8: bool) -> int:
    """The last place in (0, limit] to cut: behind a line, before a space, between characters."""
    low = max(limit - SEARCHED, 0)
    line = data.rfind(b"\n", low, limit) + 1
    if line:
        return line
    space = data.rfind(b" ", low + 1, limit)
    if space > 0:
        return space
    for back in range(4 if utf8 and limit < len(data) else 0):
        if limit - back > 0 and data[limit - back] & 0xC0 != 0x80:
            return limit - back
    return limit


def edges(
    file: IO[bytes], size: int, separator: Separator | None, step: int, utf8: bool
) -> list[int]:
    """Offsets at which a file can be divided, about `step` bytes apart, its ends included.

    They are behind separators, wherever the next one is; without a separator, at good places to
    cut. Only the surroundings of the edges are read.
    """
    found = [0]
    while (start := found[-1] + step) < size:
        found.append(separator.after(file, start) if separator else _cut_after(file, start, utf8))
    return found if found[-1] >= size else [*found, size]


def _cut_after(file: IO[bytes], start: int, utf8: bool) -> int:
    """The first good place to cut at or soon after `start`."""
    file.seek(start)
    data = file.read(SEARCHED)
    line = data.find(b"\n") + 1
    if line:
        return start + line
    space = data.find(b" ")
    if space >= 0:
        return start + space
    return character_start(file, start) if utf8 else start


def character_start(file: IO[bytes], offset: int) -> int:
    """The nearest offset at or before `offset` where a character of UTF-8 begins."""
    low = max(offset - 3, 0)
    file.seek(low)
    data = file.read(offset - low + 1)
    for back in range(offset - low + 1):
        place = offset - low - back
        if place >= len(data) or data[place] & 0xC0 != 0x80:
            return offset - back
    return offset
