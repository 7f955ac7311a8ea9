"""Bring a source's documents onto this disk as one text file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dtt import storage
from dtt.config.schema import Config
from dtt.data.sources import open_source
from dtt.errors import EXIT_DONE

SEPARATOR = "\n\n\n"
"""Between documents: no story has it, and it is rare enough elsewhere to look at."""


def download_command(config: Config, *, output: Path | None) -> int:
    """Write the corpus to `output` (default: <data.dir>/<source>.txt); return the exit code."""
    source = open_source(config.data.source)
    path = output or config.data.dir / f"{config.data.source.name}.txt"
    count = 0

    def chunks() -> Iterator[bytes]:
        nonlocal count
        for part in source.parts(0.0):
            for document in source.read(part):
                yield (document.text + (SEPARATOR if document.ends else "")).encode()
                count += document.ends

    storage.make_folder(path.parent)
    written = storage.write_stream_atomic(path, chunks())
    print(f"{path}: {count:,} documents, {written.size:,} bytes, sha256 {written.sha256[:16]}")
    print(f"  dtt train --data-path {path} --data.source.separator '\\n\\n\\n'")
    return EXIT_DONE
