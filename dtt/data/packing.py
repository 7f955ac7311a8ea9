"""Best-fit packing: windows of whole documents, so that as few as possible are cut.

"Fewer Truncations Improve Language Modeling" (Ding et al. 2024, arxiv.org/abs/2404.10830): a
document longer than a window is divided into full windows and a rest; rests and short documents
are packed, longest first, each into the window whose room fits it best. Every target of the stream
is in one window, once; windows that are not full are padded.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from dtt import storage
from dtt.data.shards import DocumentIndex, Manifest, TokenStream
from dtt.data.windows import I64
from dtt.errors import StorageError

VERSION = 1
"""Of the algorithm: a division by another one is made again."""
VERIFIED = 64 << 20
"""Bytes of a file up to which it is hashed whenever it is opened: a tenth of a second at most."""
LONG_DOCUMENTS = 1.0
"""`auto` packs corpora whose documents have on average at most so many windows."""


def choose_packing(asked: str, manifest: Manifest, context: int) -> str:
    """Return "best-fit" or "contiguous"; `auto` packs where documents are mostly short."""
    if asked != "auto":
        return asked
    documents = max(1, manifest.total("train", "documents"))
    short = manifest.total("train", "tokens") <= LONG_DOCUMENTS * context * documents
    return "best-fit" if short else "contiguous"


def pack(lengths: I64, context: int) -> I64:
    """Return the bin, of `context` tokens, of each piece of `lengths` (1 to `context`).

    Best fit decreasing over counts instead of pieces: all pieces of a length that go into bins of
    one room are placed at once, so that the work is in numpy.
    """
    order = np.argsort(-lengths, kind="stable")
    bins = np.empty(len(lengths), np.int64)
    # by_room[r]: bins with room r, the newest last.
    by_room: list[list[I64]] = [[] for _ in range(context + 1)]
    open_rooms = np.zeros(context + 1, bool)
    used, place = 0, 0
    counts = np.bincount(lengths, minlength=context + 1)
    for length in np.flatnonzero(counts)[::-1].tolist():
        todo = int(counts[length])
        while todo:
            room = length + int(open_rooms[length:].argmax())
            fresh = not open_rooms[room]
            room = context if fresh else room
            # Once a piece is in a bin, that bin fits the next one of its length best: fill it up.
            each = room // length
            wanted = -(-todo // each)
            if fresh:
                chosen, used = np.arange(used, used + wanted), used + wanted
            else:
                chosen = by_room[room].pop()
                if len(chosen) > wanted:
                    by_room[room].append(chosen[wanted:])
                    chosen = chosen[:wanted]
                open_rooms[room] = bool(by_room[room])
            placed = min(todo, each * len(chosen))
            bins[order[place : place + placed]] = np.repeat(chosen, each)[:placed]
            last = placed - each * (len(chosen) - 1)
            for some, inside in ((chosen[:-1], each), (chosen[-1:], last)):
                left = room - inside * length
                if left and len(some):
                    by_room[left].append(some)
                    open_rooms[left] = True
            place, todo = place + placed, todo - placed
    return bins


class PackedWindows:
    """Windows of whole documents, and of parts of those that are longer than a window."""

    def __init__(self, stream: TokenStream, context: int, isolate: int | None = None) -> None:
        self.stream, self.context, self.isolate = stream, context, isolate
        self._pieces, self._first = _cached(stream, context)
        self.count = len(self._first) - 1

    @property
    def padding(self) -> float:
        """Share of the places in all windows that hold no token."""
        return 1 - (len(self.stream) - 1) / (self.count * self.context)

    def starts(self, windows: I64, epoch: int) -> I64:
        return np.asarray(self._pieces[self._first[windows], 0])

    def sizes(self, windows: I64) -> I64:
        first, stop = self._first[windows], self._first[windows + 1]
        owner = np.repeat(np.arange(len(windows)), stop - first)
        before = np.cumsum(stop - first) - (stop - first)
        places = np.arange(len(owner)) - np.repeat(before - first, stop - first)
        return np.bincount(owner, self._pieces[places, 1], len(windows)).astype(np.int64)

    def fill(self, window: int, epoch: int, tokens: I64, targets: I64) -> list[int]:
        places, place = [], 0
        for start, length in self._pieces[self._first[window] : self._first[window + 1]].tolist():
            piece = self.stream.read(start, length + 1)
            tokens[place : place + length] = piece[:-1]
            targets[place : place + length] = piece[1:]
            places.append(place)
            place += length
        return places


def divide(lengths: I64, context: int) -> tuple[I64, I64]:
    """Return (pieces [P, 2]: start in the stream and length, first piece of each window [W + 1])
    for documents of `lengths` tokens that follow each other in a stream."""
    starts = np.cumsum(lengths) - lengths  # inputs begin at the end-of-text token before
    whole, rest = lengths // context, lengths % context
    full = np.repeat(starts, whole)
    # The n-th full window of a document begins n windows behind its start.
    full += context * (np.arange(len(full)) - np.repeat(np.cumsum(whole) - whole, whole))
    cut = np.flatnonzero(rest)
    starts, rest = (starts + whole * context)[cut], rest[cut]
    del whole, cut  # of a corpus of ten million documents each is 80 MB
    bins = pack(rest, context)
    order = np.lexsort((starts, bins))
    pieces = np.empty((len(full) + len(rest), 2), np.int64)
    pieces[: len(full), 0], pieces[: len(full), 1] = full, context
    pieces[len(full) :, 0], pieces[len(full) :, 1] = starts[order], rest[order]
    sizes = np.bincount(bins) if len(bins) else np.zeros(0, np.int64)
    first = np.concatenate([np.arange(len(full) + 1), len(full) + np.cumsum(sizes)])
    return pieces, first


def _cached(stream: TokenStream, context: int) -> tuple[I64, I64]:
    """Return the division of a stream, from its folder where it was made before.

    It is made again where it is damaged or of other documents, and only in memory where the folder
    cannot be written.
    """
    index = DocumentIndex(stream.folder, stream.manifest, stream.split)
    label = f"{stream.split}-packed-{context}"
    paths = [stream.folder / f"{label}-{kind}.npy" for kind in ("pieces", "windows")]
    record = stream.folder / f"{label}.json"
    digest = hashlib.sha256(f"{VERSION} {index.digest()}".encode()).hexdigest()
    try:
        facts = json.loads(record.read_bytes())
        if facts["documents"] == digest:
            pieces, first = (_open(p, facts[p.name]) for p in paths)
            return pieces, first
    except (OSError, ValueError, EOFError, KeyError, TypeError, StorageError):
        pass
    index.verify()
    made = divide(index.lengths(), context)
    try:
        # Two processes that do this at once write the same bytes.
        files = {p.name: list(_write(p, a)) for p, a in zip(paths, made, strict=True)}
        storage.write_atomic(record, json.dumps({"documents": digest, **files}))
    except StorageError:
        return made
    return _open(paths[0], files[paths[0].name]), _open(paths[1], files[paths[1].name])


def _write(path: Path, array: I64) -> storage.Written:
    """Write an array as an .npy file, without a copy of it in memory."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    return storage.write_stream_atomic(path, [head.getvalue(), array.data.cast("B")])


def _open(path: Path, facts: list[Any]) -> I64:
    """Map what `_write` wrote; ValueError if it is not that, as far as looking is cheap."""
    size, digest = facts
    if path.stat().st_size != size or (size <= VERIFIED and storage.file_digest(path) != digest):
        raise ValueError(f"{path} is damaged")
    array: I64 = np.load(path, mmap_mode="r")
    return array
