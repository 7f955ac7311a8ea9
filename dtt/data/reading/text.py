"""Text files, plain or compressed, as documents."""

from __future__ import annotations

import codecs
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

from dtt.config.sources import Text, record_format
from dtt.data import documents
from dtt.data.documents import END, EXPANSION, Document, Part, Piece, Weighed, grouped
from dtt.data.reading.compression import DamagedError
from dtt.data.reading.faults import Faults
from dtt.data.reading.files import (
    BLOCK,
    File,
    blocks,
    contents_digest,
    find_files,
    open_file,
    shown,
)
from dtt.data.reading.spans import (
    KEY_BYTES,
    LONGEST,
    Separator,
    Span,
    character_start,
    edges,
    spans,
)
from dtt.errors import DataError

# Encodings in which a line feed is the byte 10 and nothing else has that byte: files can be cut.
CUTTABLE = {"utf-8", "ascii", *(f"iso8859-{n}" for n in range(1, 17))} | {
    f"cp{n}" for n in (*range(1250, 1259), 437, 850)
}
DAMAGED = "rests of damaged files"
BOM = "\ufeff".encode()
# Where another encoding is changed to UTF-8, bytes that it does not have become an invalid one.
codecs.register_error("dtt.invalid", lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


class TextReader:
    """Text files; a large one is divided behind separators, or at the ends of lines.

    A document of more than LONGEST bytes comes in pieces. A compressed file, and one whose encoding
    cannot be entered in the middle, is read by one worker.
    """

    def __init__(self, settings: Text) -> None:
        self.settings = settings
        self.bad: Counter[str] = Counter()
        self._faults = Faults(settings.on_bad, self.bad)
        self.files = find_files(settings.path)
        if not any(file.size for file in self.files):
            names = ", ".join(shown(name) for name in settings.path)
            raise DataError(f"{names}: the text is empty", "give a file with text in it")
        for file in self.files:
            if record_format(file.name) in ("parquet", "arrow"):
                raise DataError(
                    f"{shown(file.name)} has rows, not text", "set data.source.name to records"
                )
        if self._is_blank():
            names = ", ".join(shown(name) for name in settings.path)
            raise DataError(f"{names}: the text has only blanks", "give a file with text in it")
        self._by_name = {file.name: file for file in self.files}
        # A byte-order mark is taken off below, so that it is not in every separator too.
        name = codecs.lookup(settings.encoding).name
        self._stored = "utf-8" if name == "utf-8-sig" else name
        self._encoding = self._stored if self._stored in CUTTABLE else "utf-8"
        self._utf8 = self._encoding == "utf-8"
        mark = settings.separator
        self._separator = Separator(mark.encode(self._encoding)) if mark else None

    def _is_blank(self) -> bool:
        """Whether a small text has nothing in it; a large one is not read for that."""
        if sum(file.size for file in self.files) > BLOCK or any(f.compression for f in self.files):
            return False
        return not any(block.strip() for file in self.files for block in blocks(file))

    def documents(self) -> int | None:
        if not self.settings.separator:
            return len(self.files)
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
        return grouped(self._pieces(tail), self._part_bytes)

    def _pieces(self, tail: float) -> Iterator[Weighed]:
        cut, offset = (1 - tail) * sum(file.size for file in self.files), 0
        for file in self.files:
            inside = cut - offset if tail else float(file.size)
            offset += file.size
            if not file.size:
                continue
            if self._is_stream(file):
                yield from self._stream_pieces(file, inside, tail)
            else:
                yield from self._file_pieces(file, inside, tail)

    def _is_stream(self, file: File) -> bool:
        return file.compression is not None or self._stored != self._encoding

    def _file_pieces(self, file: File, cut: float, tail: float) -> Iterator[Weighed]:
        inside = int(cut)
        with open_file(file) as opened:
            if self._utf8 and 0 < inside < file.size:
                inside = character_start(opened, inside)
            places = {0, file.size} | ({inside} if 0 < inside < file.size else set())
            if tail or self._separator or file.size > LONGEST:
                step = self._part_bytes
                places |= set(edges(opened, file.size, self._separator, step, self._utf8))
        ordered = sorted(places)
        for a, b in itertools.pairwise(ordered):
            held_out = a >= inside if tail else None
            yield Weighed(Piece(file.name, a, b, b in (file.size, inside)), b - a, held_out)

    def _stream_pieces(self, file: File, inside: float, tail: float) -> Iterator[Weighed]:
        """One piece, or two with a tail split inside of the file, for which it is read."""
        size = file.size * (EXPANSION if file.compression else 1)
        if not tail or not 0 < inside < file.size:
            held_out = inside <= 0 if tail else None
            yield Weighed(Piece(file.name, 0, END, True), size, held_out)
            return
        length = sum(len(block) for block in self._blocks(file))
        cut = int(inside * length / file.size)
        around = b"".join(self._blocks(file, max(cut - 3, 0), cut + 1))
        while self._utf8 and cut and around and around[-1] & 0xC0 == 0x80:
            cut, around = cut - 1, around[:-1]
        self.bad.clear()  # reading it again counts them
        yield Weighed(Piece(file.name, 0, cut, True), size, False)
        yield Weighed(Piece(file.name, cut, END, True), size, True)

    def _blocks(self, file: File, start: int = 0, stop: int = END) -> Iterator[bytes]:
        """The bytes [start, stop) of a file, in `_encoding`; where it is damaged, those before."""
        try:
            if self._stored == self._encoding:
                yield from blocks(file, start, None if stop == END else stop)
                return
            offset = 0
            for block in self._changed_to_utf8(file):
                yield block[max(start - offset, 0) : max(stop - offset, 0)]
                offset += len(block)
        except DamagedError as error:
            damage = error
            self._faults.leave_out(DAMAGED, lambda: damage)

    def _changed_to_utf8(self, file: File) -> Iterator[bytes]:
        strict = self.settings.on_bad == "error"
        decoder = codecs.getincrementaldecoder(self._stored)("strict" if strict else "dtt.invalid")
        before = 0
        for block in (*blocks(file), b""):
            waiting = decoder.getstate()[0]
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                offset = before - len(waiting) + error.start
                raise DataError(
                    f"{shown(file.name)}: byte {offset} (0x{error.object[error.start]:02x}) "
                    f"is not {self._stored}",
                    "name the right data.source.encoding, or set data.source.on_bad to replace "
                    "or skip",
                ) from None
            before += len(block)
            yield text.encode("utf-8", "surrogateescape")

    def read(self, part: Part) -> Iterator[Document]:
        for piece in part.pieces:
            file = self._by_name[piece.path]
            stream = self._blocks(file, piece.start, piece.stop)
            found = spans(stream, self._separator, piece.start, LONGEST, self._utf8)
            yield from self._documents(file, piece, found)

    def _documents(self, file: File, piece: Piece, found: Iterator[Span]) -> Iterator[Document]:
        key, place = self._key_of_file(file, piece), lambda: shown(file.name)
        for span in found:
            ends = span.ends and (piece.ends or self._separator is not None)
            whole = span.begins and ends and key is None
            raw, offset = span.raw, span.offset
            if not whole and key is None:
                key = raw[:KEY_BYTES]
            if offset == 0 and self._utf8 and raw.startswith(BOM):
                raw, offset = raw[len(BOM) :], len(BOM)
            text = self._faults.decode(raw, self._encoding, place, offset)
            if whole:
                if text and text.strip():
                    yield Document(text)
            elif text or ends:  # its end must come, even if the last piece is left out
                yield Document(text or "", ends=ends, key=key)
            if ends:
                key = None

    def _key_of_file(self, file: File, piece: Piece) -> bytes | None:
        """The beginning of a file that is one document and is read in pieces."""
        whole = piece.start == 0 and piece.stop in (file.size, END)
        if self._separator or whole:
            return None
        return b"".join(self._blocks(file, 0, KEY_BYTES))
