"""Rows of JSON lines, Parquet and Arrow files as documents."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtt.config.sources import COMPRESSIONS, RECORDS, Records, record_format
from dtt.data import documents
from dtt.data.documents import END, EXPANSION, Document, Part, Piece, Weighed, grouped
from dtt.data.reading.border import (
    BEFORE,
    BEHIND,
    Border,
    border_of_lines,
    border_of_stream,
    border_of_table,
    share_of,
)
from dtt.data.reading.columns import data_set_files, open_table, rows_of
from dtt.data.reading.compression import DamagedError
from dtt.data.reading.faults import Faults, Place
from dtt.data.reading.files import (
    File,
    blocks,
    contents_digest,
    find_files,
    is_remote,
    not_permitted,
    open_file,
    shown,
)
from dtt.data.reading.long_row import BadRowError, LongRow
from dtt.data.reading.rows import RowTexts
from dtt.data.reading.spans import KEY_BYTES, LONGEST, Separator, Span, edges, good_cut, spans
from dtt.errors import DataError

LINE = Separator(b"\n")
BOM = "\ufeff".encode()
NOT_JSON = "rows that are not JSON"
LONG = f"rows of more than {LONGEST >> 20} MiB that are not JSON or have no text"
DAMAGED = "rests of damaged files"
UNREADABLE = "damaged files"


class RecordsReader:
    """Rows, one a document. A text of more than LONGEST bytes comes in pieces.

    Plain JSON lines are divided at the ends of lines, Parquet files at row groups, and Arrow files
    at record batches; a compressed file of JSON lines is read by one worker.
    """

    def __init__(self, settings: Records) -> None:
        self.settings = settings
        self.bad: Counter[str] = Counter()
        self._faults = Faults(settings.on_bad, self.bad)
        self._texts = RowTexts(settings, self._faults)
        self.files = _find(settings)
        if not any(file.size for file in self.files):
            names = ", ".join(shown(name) for name in settings.path)
            raise DataError(f"{names}: no rows", "give a file with rows in it")
        self._by_name = {file.name: file for file in self.files}
        self._kinds = {file.name: _kind(settings, file) for file in self.files}

    def documents(self) -> int | None:
        if sum(file.size for file in self.files) > documents.PART_BYTES:
            return None
        count = sum(d.ends for part in self.parts(0.0) for d in self.read(part))
        self.bad.clear()
        return count

    @property
    def _part_bytes(self) -> int:
        return documents.part_bytes(sum(file.size for file in self.files))

    def fingerprint(self) -> dict[str, Any]:
        return self.settings.model_dump(exclude={"path"}) | {"files": contents_digest(self.files)}

    def parts(self, tail: float) -> list[Part]:
        """As SourceReader; a tail split is at the row that begins at or after its place, or inside
        of a row where that would be further away than half of the smaller side."""
        return grouped(self._pieces(tail), self._part_bytes)

    def _pieces(self, tail: float) -> Iterator[Weighed]:
        total, offset = sum(file.size for file in self.files), 0
        for file in self.files:
            if not file.size:
                continue
            share = min(max(((1 - tail) * total - offset) / file.size, 0.0), 1.0)
            offset += file.size
            most = min(tail, 1 - tail) * total / 2 / file.size
            for piece, size, border in self._ranges(file, share, most):
                if tail:
                    yield from border.sides(piece, size)
                else:
                    yield Weighed(piece, size, None)

    def _ranges(self, file: File, share: float, most: float) -> Iterator[tuple[Piece, int, Border]]:
        """Yield a file's pieces with their bytes, and the border up to which a `share` of it goes,
        which may be as far away as `most` of it."""
        if self._kinds[file.name] != "jsonl":
            yield from self._row_ranges(file, share, most)
            return
        border = BEFORE if share == 0 else BEHIND
        if file.compression is None:
            with open_file(file) as opened:
                places = edges(opened, file.size, LINE, self._part_bytes, utf8=True)
                if 0 < share < 1:
                    place = int(share * file.size)
                    border = border_of_lines(opened, place, LINE, most * file.size)
            ordered = sorted({*places, *(edge for edge in border.edges if edge < END)})
            for a, b in itertools.pairwise(ordered):
                yield Piece(file.name, a, b, True), b - a, border
            return
        if 0 < share < 1:
            border = self._border_of_stream(file, share, most)
        for a, b in itertools.pairwise(sorted({0, END, *border.edges})):
            yield Piece(file.name, a, b, True), file.size * EXPANSION, border

    def _row_ranges(
        self, file: File, share: float, most: float
    ) -> Iterator[tuple[Piece, int, Border]]:
        border = BEFORE if share == 0 else BEHIND
        try:
            with open_table(file, self._kinds[file.name]) as table:
                if 0 < share < 1 and table.rows:
                    border = border_of_table(table.rows, share * table.rows, most * table.rows)
                ordered = sorted({*table.groups, *(e for e in border.edges if e < END)})
                weight = table.size / max(table.rows, 1)
        except DamagedError as error:
            if self.settings.on_bad == "error":
                raise error from None
            ordered, weight = [0, END], 0.0  # its reader counts it
        start = 0
        for stop in ordered[1:]:  # the batches of Arrow files may be small
            if stop in (*border.edges, ordered[-1]) or (stop - start) * weight >= self._part_bytes:
                size = int((stop - start) * weight)
                yield Piece(file.name, start, stop, True), size, border
                start = stop

    def _border_of_stream(self, file: File, share: float, most: float) -> Border:
        length = sum(len(block) for block in self._blocks(file))
        border = border_of_stream(self._blocks(file), int(share * length), most * length)
        self.bad.clear()  # reading it again counts them
        return border

    def _blocks(self, file: File, start: int = 0, stop: int = END) -> Iterator[bytes]:
        try:
            yield from blocks(file, start, None if stop == END else stop)
        except DamagedError as error:
            damage = error
            self._faults.leave_out(DAMAGED, lambda: damage)

    def read(self, part: Part) -> Iterator[Document]:
        for piece in part.pieces:
            if piece.share is None:
                yield from self._read_piece(piece)
            else:
                yield from self._read_share(piece, *piece.share)

    def _read_piece(self, piece: Piece) -> Iterator[Document]:
        file = self._by_name[piece.path]
        if self._kinds[file.name] == "jsonl":
            return self._read_lines(file, piece)
        return self._read_table(file, piece)

    def _read_share(self, piece: Piece, low: float, high: float) -> Iterator[Document]:
        """A share of a row's text; what is bad in the row is counted with its beginning."""
        before = self.bad.copy()
        length = sum(len(document.text) for document in self._read_piece(piece))
        self._count_as(before)
        yield from share_of(self._read_piece(piece), int(length * low), int(length * high))
        if low:
            self._count_as(before)

    def _count_as(self, counts: Counter[str]) -> None:
        self.bad.clear()
        self.bad.update(counts)

    def _read_lines(self, file: File, piece: Piece) -> Iterator[Document]:
        stream = self._blocks(file, piece.start, piece.stop)
        found = spans(stream, LINE, piece.start, LONGEST, utf8=True)
        for span in found:
            if not span.ends:
                yield from self._read_long(file, span, found)
            elif span.raw and not span.raw.isspace():
                text = self._line_text(file, span)
                if text:
                    yield Document(text)

    def _line_text(self, file: File, span: Span) -> str | None:
        def place() -> str:
            return _line_place(file, span.offset)

        raw = span.raw.removeprefix(BOM) if span.offset == 0 else span.raw
        line = self._faults.decode(raw, "utf-8", place, span.offset)
        if line is None:
            return None
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = _not_json(error, span)

            def not_json() -> DataError:
                return DataError(
                    f"{place()}: not JSON: {reason}",
                    "mend the line, or set data.source.on_bad to skip",
                )

            self._faults.leave_out(NOT_JSON, not_json)
            return None
        return self._texts.text(row, place)

    def _read_long(self, file: File, first: Span, rest: Iterator[Span]) -> Iterator[Document]:
        """Read a row that comes in several spans, which all are taken from `rest`."""
        ended = False

        def place() -> str:
            return _line_place(file, first.offset)

        def chunks() -> Iterator[str]:
            nonlocal ended
            span: Span | None = first
            while span is not None:
                ended = span.ends
                raw = span.raw.removeprefix(BOM) if span.offset == 0 else span.raw
                text = self._faults.decode(raw, "utf-8", place, span.offset)
                if text is None:
                    raise BadRowError("not UTF-8")
                yield text
                span = None if ended else next(rest, None)

        key: bytes | None = None
        try:
            if self._texts.single is None:
                raise BadRowError("too long for a template")
            for text in LongRow(chunks()).text_of(self._texts.single):
                clean = self._faults.characters(text, place)
                if clean:
                    key = key or clean.encode()[:KEY_BYTES]
                    yield Document(clean, ends=False, key=key)
        except BadRowError as error:
            reason = str(error)
            self._faults.leave_out(LONG, lambda: _too_long(place, reason))
        if key is not None:
            yield Document("", ends=True, key=key)
        while not ended:
            ended = next(rest).ends

    def _read_table(self, file: File, piece: Piece) -> Iterator[Document]:
        number = piece.start
        try:
            with open_table(file, self._kinds[file.name]) as table:
                for first, batch in table.batches(piece.start, piece.stop, self._texts.names):
                    for number, row in enumerate(rows_of(batch), first):
                        yield from self._read_row(file, number, row, table.names)
        except DamagedError as error:
            at = f" (behind row {number:,})" if number else ""
            damage = DataError(f"{error.what}{at}", error.fix)
            self._faults.leave_out(DAMAGED if number else UNREADABLE, lambda: damage)

    def _read_row(
        self, file: File, number: int, row: dict[str, Any], columns: list[str]
    ) -> Iterator[Document]:
        def place() -> str:
            return f"{shown(file.name)}: row {number:,}"

        for name, value in row.items():
            if not isinstance(value, memoryview):
                continue
            if len(value) > LONGEST:
                yield from self._read_long_cell(value, place, name)
                return
            row[name] = self._faults.decode(bytes(value), "utf-8", place, 0)
            if row[name] is None:
                return
        text = self._texts.text(row, place, columns)
        if text:
            yield Document(text)

    def _read_long_cell(self, value: memoryview, place: Place, name: str) -> Iterator[Document]:
        if self._texts.single != name:
            self._faults.leave_out(LONG, lambda: _too_long(place, "too long for a template"))
            return
        key = bytes(value[:KEY_BYTES])
        while value:
            raw = bytes(value[: LONGEST + 1])
            raw = raw[: good_cut(raw, LONGEST, utf8=True)] if len(raw) > LONGEST else raw
            value = value[len(raw) :]
            text = self._faults.decode(raw, "utf-8", place, 0)
            if text or not value:
                yield Document(text or "", ends=not value, key=key)


def _too_long(place: Place, reason: str) -> DataError:
    return DataError(
        f"{place()}: more than {LONGEST >> 20} MiB: {reason}",
        "mend the row, or set data.source.on_bad to skip",
    )


def _find(settings: Records) -> list[File]:
    names: list[str] = []
    for pattern in settings.path:
        try:
            inside = None if is_remote(pattern) else data_set_files(Path(pattern).expanduser())
        except PermissionError as error:  # a folder above it
            raise not_permitted(pattern, error) from None
        names += [pattern] if inside is None else inside

    def wanted(name: str) -> bool:
        found = record_format(name)
        return found is not None and settings.format in ("auto", found)

    return find_files(tuple(names), wanted)


def _kind(settings: Records, file: File) -> str:
    if settings.format != "auto":
        return settings.format
    found = record_format(file.name.split("?")[0] if is_remote(file.name) else file.name)
    if found is None:
        raise DataError(
            f"{shown(file.name)}: its name does not say its format",
            f"set data.source.format ({', '.join(sorted(set(RECORDS.values())))}), or "
            f"data.source.name text; endings known here: {', '.join(RECORDS)} and these with "
            f"{', '.join(COMPRESSIONS)}",
        )
    return found


def _line_place(file: File, offset: int) -> str:
    """Name a line by its number, which takes reading what is before it."""
    number = 1 + sum(block.count(b"\n") for block in blocks(file, 0, offset))
    return f"{shown(file.name)}: line {number:,} (byte {offset:,})"


def _not_json(error: Exception, span: Span) -> str:
    if isinstance(error, json.JSONDecodeError):
        if span.offset == 0 and span.raw.lstrip()[:1] == b"[":
            return "the file is one array, not one object per line (jq -c '.[]' makes these)"
        return f"{error.msg} (column {error.colno:,})"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
