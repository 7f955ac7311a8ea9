"""Sources: where documents come from.

A source divides itself into parts, cheaply and always in the same way; each part is read by one
worker. So the prepared data does not depend on how many workers read it.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from dtt.config.data import Source as SourceSettings
from dtt.config.data import Stdlib, Tales, Text
from dtt.data.tales import tales
from dtt.errors import DataError

PART_BYTES = 2 << 20
PART_STORIES = 2500
# Encodings in which a line feed is the byte 10 and nothing else has that byte: files can be cut.
CUTTABLE = {"utf-8", "ascii", *(f"iso8859-{n}" for n in range(1, 17))} | {
    f"cp{n}" for n in (*range(1250, 1259), 437, 850)
}
HASH_WHOLE_BELOW = 1 << 30
"""Corpora larger than this are recognised by names, sizes and times instead of contents."""


@dataclass(frozen=True)
class Document:
    """A text, or with `ends` False a piece of one that goes on in the next part."""

    text: str
    bits: float | None = None
    """Its exact information under the source's distribution, where that is known."""
    ends: bool = True

    @cached_property
    def utf8(self) -> bytes:
        """The text's bytes."""
        return self.text.encode("utf-8", "replace")


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a text file; `ends` says whether its last document ends there."""

    path: str
    start: int
    stop: int
    ends: bool


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

    skipped: int
    """Documents left out so far, because they could not be decoded."""

    def documents(self) -> int | None:
        """Number of documents, or None when only reading tells."""

    def fingerprint(self) -> dict[str, Any]:
        """What the corpus is: equal fingerprints promise equal documents."""

    def parts(self, tail: float) -> list[Part]:
        """All parts in order. With tail > 0 the last such share of the corpus is `held_out`."""

    def read(self, part: Part) -> Iterator[Document]:
        """The documents of a part, in order."""


class TalesReader:
    """Stories of dtt.data.tales, whose probabilities are known."""

    skipped = 0

    def __init__(self, settings: Tales) -> None:
        self.settings = settings

    def documents(self) -> int | None:
        return self.settings.stories

    def fingerprint(self) -> dict[str, Any]:
        first = "".join(t.text for t in tales(self.settings.seed, 0, 8))
        return self.settings.model_dump() | {"first": hashlib.sha256(first.encode()).hexdigest()}

    def parts(self, tail: float) -> list[Part]:
        total = self.settings.stories
        cut = int((1 - tail) * total)
        edges = sorted({*range(0, total, PART_STORIES), cut, total})
        return [
            Part(index, a, b, held_out=(a >= cut) if tail else None)
            for index, (a, b) in enumerate(itertools.pairwise(edges))
        ]

    def read(self, part: Part) -> Iterator[Document]:
        for tale in tales(self.settings.seed, part.start, part.stop - part.start):
            yield Document(tale.text, tale.bits)


class TextReader:
    """Text files; a large file is cut into parts behind a separator or the end of a line."""

    def __init__(self, settings: Text) -> None:
        self.settings, self.skipped = settings, 0
        self.files = _find_files(settings.path)
        if not any(size for _, size in self.files):
            names = ", ".join(settings.path)
            raise DataError(f"{names}: the text is empty", "give a file with text in it")
        # A byte-order mark is taken off below, so that it is not in every separator too.
        name = codecs.lookup(settings.encoding).name
        self.encoding = "utf-8" if name == "utf-8-sig" else name
        self._cuttable = self.encoding in CUTTABLE
        if not self._cuttable:
            self.files = [(name, self._length(name)) for name, _ in self.files]

    def _length(self, name: str) -> int:
        with _open(name) as file:
            return len(self._decode(file.read(), name, 0) or "")

    def documents(self) -> int | None:
        if not self.settings.separator:
            return len(self.files)
        if sum(size for _, size in self.files) > PART_BYTES:
            return None
        count = sum(1 for part in self.parts(0.0) for _ in self.read(part))
        self.skipped = 0
        return count

    def fingerprint(self) -> dict[str, Any]:
        whole = sum(size for _, size in self.files) <= HASH_WHOLE_BELOW
        return self.settings.model_dump(exclude={"path"}) | {
            "files": [
                [Path(name).name, size, _sha256(name) if whole else os.stat(name).st_mtime_ns]
                for name, size in self.files
            ]
        }

    def parts(self, tail: float) -> list[Part]:
        parts: list[Part] = []
        for held_out, pieces in itertools.groupby(self._pieces(tail), lambda item: item[0]):
            group: list[Piece] = []
            for _, piece in pieces:
                group.append(piece)
                if sum(p.stop - p.start for p in group) >= PART_BYTES:
                    parts.append(Part(len(parts), pieces=tuple(group), held_out=held_out))
                    group = []
            if group:
                parts.append(Part(len(parts), pieces=tuple(group), held_out=held_out))
        return parts

    def _pieces(self, tail: float) -> Iterator[tuple[bool | None, Piece]]:
        """Yield the pieces of all files in order, each with its side of a tail split."""
        cut, offset = (1 - tail) * sum(size for _, size in self.files), 0
        for name, size in self.files:
            inside = self._character_start(name, int(cut - offset)) if tail else size
            edges = {0, size} | ({inside} if 0 < inside < size else set())
            # A part of a file knows nothing of the rest, and the split is by whole documents.
            if self._cuttable and (tail or self.settings.separator):
                edges |= self._lines(name, size)
            for a, b in itertools.pairwise(sorted(edges)):
                yield (a >= inside if tail else None), Piece(name, a, b, b in (size, inside))
            offset += size

    def _lines(self, name: str, size: int) -> set[int]:
        """Offsets behind a separator (or the end of a line), one in about PART_BYTES."""
        mark = (self.settings.separator or "\n").encode(self.encoding)
        with _open(name) as file:
            return {_after(file, mark, start) for start in range(PART_BYTES, size, PART_BYTES)}

    def _character_start(self, name: str, offset: int) -> int:
        """The nearest offset at or before `offset` where a character begins."""
        utf8 = self.encoding == "utf-8"
        with _open(name) as file:
            while utf8 and offset > 0:
                file.seek(offset)
                byte = file.read(1)
                if not byte or byte[0] & 0xC0 != 0x80:
                    break
                offset -= 1
        return offset

    def read(self, part: Part) -> Iterator[Document]:
        for piece in part.pieces:
            yield from self._read_piece(piece)

    def _read_piece(self, part: Piece) -> Iterator[Document]:
        with _open(part.path) as file:
            if not self._cuttable:
                yield from self._read_whole(file.read(), part)
                return
            file.seek(part.start)
            raw = file.read(part.stop - part.start)
        if b"\0" in raw:
            raise DataError(
                f"{part.path}: a NUL byte at offset {part.start + raw.index(0)}: "
                "this is a binary file",
                "give a text file (or say its data.source.encoding, such as utf-16)",
            )
        separator, offset = self.settings.separator, part.start
        mark = separator.encode(self.encoding) if separator else None
        for piece in raw.split(mark) if mark else [raw]:
            text = self._decode(piece, part.path, offset)
            offset += len(piece) + len(mark or b"")
            if text is None:
                self.skipped += 1
            elif text.strip() if mark else text:
                yield Document(text, ends=part.ends or mark is not None)

    def _read_whole(self, raw: bytes, part: Piece) -> Iterator[Document]:
        """Read a file whose encoding cannot be entered in the middle; offsets are characters."""
        text = self._decode(raw, part.path, 0)
        if text is None:
            self.skipped += 1
            return
        text, mark = text[part.start : part.stop], self.settings.separator
        for piece in text.split(mark) if mark else [text]:
            if piece.strip() if mark else piece:
                yield Document(piece, ends=part.ends or mark is not None)

    def _decode(self, raw: bytes, name: str, offset: int) -> str | None:
        encoding, on_bad = self.encoding, self.settings.on_bad
        try:
            text = raw.decode(encoding, "replace" if on_bad == "replace" else "strict")
        except UnicodeDecodeError as error:
            if on_bad == "skip":
                return None
            raise DataError(
                f"{name}: byte {offset + error.start} (0x{raw[error.start]:02x}) is not {encoding}",
                "name the right data.source.encoding, or set data.source.on_bad to replace or skip",
            ) from None
        return text.removeprefix("\ufeff") if offset == 0 else text


class StdlibReader:
    """The .py files of the running Python's standard library, but for the few not in UTF-8."""

    def __init__(self, settings: Stdlib) -> None:
        self.settings, self.skipped = settings, 0
        root = Path(sysconfig.get_paths()["stdlib"])
        found = (
            path
            for path in root.rglob("*.py")
            if not {"site-packages", "dist-packages", "__pycache__"} & set(path.parts)
        )
        self.files = [(str(p), p.stat().st_size) for p in sorted(found)]
        if not self.files:
            raise DataError(f"no Python sources below {root}", "use another data.source")

    def documents(self) -> int | None:
        return len(self.files)

    def fingerprint(self) -> dict[str, Any]:
        names = [[Path(name).name, size, _sha256(name)] for name, size in self.files]
        return {"name": "stdlib", "files": hashlib.sha256(repr(names).encode()).hexdigest()}

    def parts(self, tail: float) -> list[Part]:
        total, before, start = sum(size for _, size in self.files), 0, 0
        parts: list[Part] = []
        cut = total - tail * total
        for index, (_, size) in enumerate(self.files, 1):
            crossing = tail > 0 and before < cut <= before + size
            before += size
            if before >= (len(parts) + 1) * PART_BYTES or crossing or index == len(self.files):
                held_out = before > cut if tail else None
                parts.append(Part(len(parts), start, index, held_out=held_out))
                start = index
        return parts

    def read(self, part: Part) -> Iterator[Document]:
        for name, _ in self.files[part.start : part.stop]:
            try:
                text = Path(name).read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                self.skipped += 1
                continue
            if text:
                yield Document(text)


SOURCES: dict[str, Any] = {"tales": TalesReader, "stdlib": StdlibReader, "text": TextReader}


def open_source(settings: SourceSettings) -> SourceReader:
    """Return the reader of a source; DataError when it is missing or empty."""
    reader: SourceReader = SOURCES[settings.name](settings)
    return reader


def _find_files(patterns: tuple[str, ...]) -> list[tuple[str, int]]:
    """Resolve files, folders and globs to (path, size), in the order given, sorted within each."""
    files: dict[str, int] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = sorted(str(p) for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
        elif path.exists():
            found = [str(path)]
        else:
            found = sorted(n for n in glob.glob(str(path), recursive=True) if Path(n).is_file())
        if not found:
            what = "no files in it" if path.is_dir() else "no such file, folder or glob"
            raise DataError(f"{pattern}: {what}", "check data.source.path")
        files |= {name: os.stat(name).st_size for name in found}
    return list(files.items())


def _open(name: str) -> Any:
    try:
        return open(name, "rb")
    except OSError as error:
        raise DataError(f"{name}: {(error.strerror or str(error)).lower()}") from None


def _sha256(name: str) -> str:
    with _open(name) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _after(file: Any, mark: bytes, start: int) -> int:
    """Offset just behind the first `mark` that begins at or after `start`, else the file's end."""
    file.seek(start)
    tail, offset = b"", start
    while block := file.read(1 << 16):
        found = (tail + block).find(mark)
        if found >= 0:
            return int(offset - len(tail) + found + len(mark))
        offset += len(block)
        tail = (tail + block)[-(len(mark) - 1) :] if len(mark) > 1 else b""
    return int(offset)
