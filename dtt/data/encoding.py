"""Encoding the parts of a corpus, on all cores."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from dtt import storage
from dtt.data.shards import SPLITS, Shard, write_shard
from dtt.data.sources import Document, Part, SourceReader
from dtt.machine import cores
from dtt.tokenizer import Tokenizer


def held_out(document: Document, part: Part, fraction: float) -> bool:
    """Whether a document belongs to validation: by its part, else by a hash of its text, so that
    equal documents are always on the same side."""
    if part.held_out is not None:
        return part.held_out
    digest = hashlib.blake2b(document.utf8, digest_size=8).digest()
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


class PartEncoder:
    """Encodes a part to a shard per split, and a row of figures that says that it is done."""

    def __init__(
        self, source: SourceReader, tokenizer: Tokenizer, folder: Path, val_fraction: float
    ) -> None:
        self.source, self.tokenizer, self.folder = source, tokenizer, folder
        self.val_fraction = val_fraction
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")

    def __call__(self, part: Part) -> None:
        skipped = self.source.skipped
        writers = {split: _ShardWriter(self.tokenizer) for split in SPLITS}
        for document in self.source.read(part):
            name = "val" if held_out(document, part, self.val_fraction) else "train"
            writers[name].add(document)
        row: dict[str, Any] = {"skipped": self.source.skipped - skipped}
        for split, writer in writers.items():
            if writer.tokens:
                shard = writer.write(self.folder, f"{split}-{part.index:05d}", self.dtype)
                row[split] = asdict(shard)
        storage.write_atomic(row_path(self.folder, part.index), json.dumps(row))


def row_path(folder: Path, index: int) -> Path:
    """Where the figures of a part are until the manifest has them."""
    return folder / f"part-{index:05d}.json"


class _ShardWriter:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[Any] = []
        self.ends: list[int] = []
        self.length = self.bytes = self.unknown = 0
        self.bits: float | None = 0.0

    def add(self, document: Document) -> None:
        ids = self.tokenizer.encode(document.text)
        if self.tokenizer.unknown is not None:
            self.unknown += int((ids == self.tokenizer.unknown).sum())
        self.tokens.append(ids)
        self.length += len(ids)
        self.bytes += len(document.utf8)
        known = self.bits is not None and document.bits is not None
        self.bits = self.bits + document.bits if known else None  # type: ignore[operator]
        if document.ends:
            self.tokens.append(np.array([self.tokenizer.end_of_text], np.uint32))
            self.length += 1
            self.ends.append(self.length)

    def write(self, folder: Path, name: str, dtype: np.dtype[Any]) -> Shard:
        return write_shard(
            folder,
            name,
            np.concatenate(self.tokens).astype(dtype),
            np.array(self.ends, np.uint64),
            bytes=self.bytes,
            unknown=self.unknown,
            bits=self.bits,
        )


_function: Callable[[Part], Any] | None = None
"""In a worker: what it applies to each part. Set once, so that tasks carry only their part."""


def map_parts(
    function: Callable[[Part], Any], parts: Sequence[Part], workers: int
) -> Iterator[Any]:
    """Apply `function` to each part, in order, on all cores (or `workers` processes)."""
    workers = min(workers or cores(), len(parts))
    if workers <= 1:
        yield from map(function, parts)
        return
    # Forked workers start in milliseconds; elsewhere than on Linux forking is not safe.
    method = "fork" if sys.platform == "linux" else "spawn"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, context, _begin, (function,)) as pool:
        try:
            yield from pool.map(_apply, parts)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(function: Callable[[Part], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to act on
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _apply(part: Part) -> Any:
    assert _function is not None
    return _function(part)
