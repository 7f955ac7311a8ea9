"""Sources: where documents come from.

A source divides itself into parts, cheaply and always in the same way; each part is read by one
worker. So the prepared data does not depend on how many workers read it.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtt import storage
from dtt.config.remote import Hub, Remote, Url
from dtt.config.sources import Source as SourceSettings
from dtt.config.sources import Stdlib, Tales
from dtt.data.documents import PART_BYTES, Document, Part, Piece, SourceReader
from dtt.data.reading.faults import UNDECODABLE
from dtt.data.reading.records import RecordsReader
from dtt.data.reading.text import TextReader
from dtt.data.tales import tales
from dtt.errors import DataError

PART_STORIES = 2500
__all__ = ["SOURCES", "Document", "Part", "Piece", "SourceReader", "open_source"]


class TalesReader:
    """Stories of dtt.data.tales, whose probabilities are known."""

    def __init__(self, settings: Tales) -> None:
        self.settings = settings
        self.bad: Counter[str] = Counter()

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


class StdlibReader:
    """The .py files of the running Python's standard library, but for the few not in UTF-8."""

    def __init__(self, settings: Stdlib) -> None:
        self.settings = settings
        self.bad: Counter[str] = Counter()
        root = Path(sysconfig.get_paths()["stdlib"])
        found: list[str] = []
        for folder, inner, names in os.walk(root):
            # Pruned, not filtered: installed packages may be a hundred times the library.
            inner[:] = set(inner) - {"site-packages", "dist-packages", "__pycache__"}
            found += [os.path.join(folder, name) for name in names if name.endswith(".py")]
        found.sort(key=lambda name: name.split(os.sep))  # as paths are ordered, not their letters
        self.files = [(name, os.stat(name).st_size) for name in found]
        if not self.files:
            raise DataError(f"no Python sources below {root}", "use another data.source")

    def documents(self) -> int | None:
        return len(self.files)

    def fingerprint(self) -> dict[str, Any]:
        names = [
            [Path(name).name, size, storage.file_digest(Path(name))] for name, size in self.files
        ]
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
                self.bad[f"{UNDECODABLE}, left out"] += 1
                continue
            if text:
                yield Document(text)


def _remote(settings: Hub | Url, folder: Path) -> SourceReader:
    from dtt.data.remote.reader import RemoteReader  # which reads its files with the readers above

    return RemoteReader(settings, folder)


SOURCES: dict[str, Any] = {
    "tales": TalesReader,
    "stdlib": StdlibReader,
    "text": TextReader,
    "records": RecordsReader,
    "hub": _remote,
    "url": _remote,
}


def open_source(settings: SourceSettings, data_dir: Path = Path("data")) -> SourceReader:
    """Return the reader of a source; DataError when it is missing or empty.

    A source that is not on this machine is downloaded first, to a folder below `data_dir`.
    """
    kind, where = SOURCES[settings.name], data_dir / "downloads"
    reader: SourceReader = kind(settings, where) if isinstance(settings, Remote) else kind(settings)
    return reader
