"""Encoding the parts of a corpus: each to a shard per split and a row of figures."""

from __future__ import annotations

import array
import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dtt import storage
from dtt.data.shards import SPLITS, Shard, write_shard
from dtt.data.sources import Document, Part, SourceReader
from dtt.errors import StorageError
from dtt.tokenizer import Tokenizer

SPILL = 32 << 20
"""Tokens of a part that are held in memory, in bytes; what is beyond waits on the disk."""


def held_out(document: Document, part: Part, fraction: float) -> bool:
    """Whether a document belongs to validation: by its part, else by a hash of its text, so that
    equal documents are always on the same side."""
    if part.held_out is not None:
        return part.held_out
    digest = hashlib.blake2b(document.identity, digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def training_documents(source: SourceReader, part: Part, fraction: float) -> Iterator[str]:
    """Yield the texts of a part that belong to training."""
    for document in source.read(part):
        if not held_out(document, part, fraction):
            yield document.text


class PartAlphabet:
    """Finds the characters of a part's training text."""

    def __init__(self, source: SourceReader, val_fraction: float) -> None:
        self.source, self.val_fraction = source, val_fraction

    def __call__(self, part: Part) -> set[str]:
        found: set[str] = set()
        for text in training_documents(self.source, part, self.val_fraction):
            found.update(text)
        return found


def dtype_of(tokenizer: Tokenizer) -> np.dtype[Any]:
    """Return how its ids are stored."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


class PartEncoder:
    """Encodes a part to a shard per split, and a row of figures that says that it is done.

    The row's bytes of text are returned. Doing a part twice does no harm, even after the manifest
    of the corpus was written.
    """

    def __init__(
        self, source: SourceReader, tokenizer: Tokenizer, folder: Path, val_fraction: float
    ) -> None:
        self.source, self.tokenizer, self.folder = source, tokenizer, folder
        self.val_fraction = val_fraction
        self.dtype = dtype_of(tokenizer)

    def __call__(self, part: Part) -> int:
        before, size = self.source.bad.copy(), 0
        writers = {split: _ShardWriter(self.tokenizer, self.folder) for split in SPLITS}
        for document in self.source.read(part):
            name = "val" if held_out(document, part, self.val_fraction) else "train"
            writers[name].add(document)
        row: dict[str, Any] = {"bad": dict(self.source.bad - before)}
        try:
            for split, writer in writers.items():
                size += writer.bytes
                if writer.length:
                    row[split] = asdict(writer.write(f"{split}-{part.index:05d}"))
            path = row_path(self.folder, part.index)
            storage.write_atomic(path, json.dumps(row))
        except StorageError:
            if not is_finished(self.folder):  # its last touch was to remove temporary files
                raise
        if is_finished(self.folder):
            path.unlink(missing_ok=True)
        return size


def row_path(folder: Path, index: int) -> Path:
    """Where the figures of a part are until the manifest has them."""
    return folder / f"part-{index:05d}.json"


def read_row(folder: Path, index: int, itemsize: int) -> dict[str, Any] | None:
    """Return the figures of a part; None if it is not made, or its files are not whole."""
    try:
        row: dict[str, Any] = json.loads(row_path(folder, index).read_text(encoding="utf-8"))
        for split in SPLITS:
            if split in row:
                file = folder / row[split]["file"]
                sizes = file.stat().st_size, file.with_suffix(".docs").stat().st_size
                if sizes != (itemsize * row[split]["tokens"], 8 * row[split]["documents"]):
                    return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return row


def is_finished(folder: Path) -> bool:
    """Whether the manifest is written, so that nothing is left to do."""
    return (folder / "manifest.json").exists()


class _ShardWriter:
    """Collects a part's tokens of one split; memory does not grow with the part."""

    def __init__(self, tokenizer: Tokenizer, folder: Path) -> None:
        self.tokenizer, self.folder, self.dtype = tokenizer, folder, dtype_of(tokenizer)
        self.end = np.array([tokenizer.end_of_text], self.dtype)
        self.pieces: list[NDArray[Any]] = []
        self.spilled: IO[bytes] | None = None
        self.ends = array.array("Q")
        self.length = self.bytes = self.unknown = self.buffered = 0
        self.bits: float | None = 0.0

    def add(self, document: Document) -> None:
        ids = self.tokenizer.encode(document.text)
        if self.tokenizer.unknown is not None:
            self.unknown += int((ids == self.tokenizer.unknown).sum())
        self._append(ids.astype(self.dtype))
        self.bytes += len(document.utf8)
        known = self.bits is not None and document.bits is not None
        self.bits = self.bits + document.bits if known else None  # type: ignore[operator]
        if document.ends:
            self._append(self.end)
            self.ends.append(self.length)

    def _append(self, ids: NDArray[Any]) -> None:
        self.pieces.append(ids)
        self.length += len(ids)
        self.buffered += ids.nbytes
        if self.buffered > SPILL:
            with storage.storage_errors(self.folder):
                if self.spilled is None:  # nameless: it goes with its process, however that ends
                    self.spilled = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
                for piece in self.pieces:
                    self.spilled.write(piece.data)
            self.pieces, self.buffered = [], 0

    def _tokens(self) -> NDArray[Any]:
        if self.spilled is None:
            return np.concatenate(self.pieces)
        with storage.storage_errors(self.folder):
            for piece in self.pieces:
                self.spilled.write(piece.data)
            self.spilled.flush()
        return np.memmap(self.spilled, self.dtype, "r", shape=(self.length,))

    def write(self, name: str) -> Shard:
        return write_shard(
            self.folder,
            name,
            self._tokens(),
            np.array(self.ends, np.uint64),
            bytes=self.bytes,
            unknown=self.unknown,
            bits=self.bits,
        )
