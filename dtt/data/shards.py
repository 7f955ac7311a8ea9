"""Token shards on disk, and the stream of tokens that they form.

A prepared corpus is a folder: manifest.json, tokenizer.json, and per part and split a file of
little-endian uint16 or uint32 token ids (`train-00000.bin`) with one of document ends
(`train-00000.docs`, uint64: tokens up to and including the end-of-text token). Files are memory
mapped and never change.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import mmap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtt import storage
from dtt.errors import DataError

FORMAT = 2
SPLITS = ("train", "val")
ENDS_AT_ONCE = 1 << 20
"""Document ends that are read at a time."""


@dataclass(frozen=True)
class Shard:
    """One file of tokens, with the figures of the text that it holds."""

    file: str
    tokens: int
    documents: int
    bytes: int
    unknown: int
    sha256: str
    docs_sha256: str
    bits: float | None
    """Exact information of its text in bits, where the source knows it."""


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds; written last, so that it exists means that all is there."""

    format: int
    spec: dict[str, Any]
    """What the data was made from; data of another spec lies in another folder."""
    tokenizer: str
    """Fingerprint of tokenizer.json."""
    dtype: str
    vocab_size: int
    bad: dict[str, int] = field(default_factory=dict)
    """Documents of the source that were left out or repaired, by reason."""
    cleaning: list[dict[str, Any]] = field(default_factory=list)
    """Each step of data.cleaning: its name, the documents it removed, by reason, and changed."""
    shards: dict[str, list[Shard]] = field(default_factory=dict)

    def total(self, split: str, figure: str) -> int:
        """Sum of a figure ("tokens", "documents", "bytes", "unknown") over a split."""
        return sum(getattr(shard, figure) for shard in self.shards[split])

    def ideal_bits(self, split: str) -> float | None:
        """Exact information of the split's text in bits, if the source knows it.

        Not once cleaning has removed or changed a document: the rest has another distribution.
        """
        if any(step["removed"] or step["changed"] for step in self.cleaning):
            return None
        bits = [shard.bits for shard in self.shards[split]]
        return None if None in bits or not bits else sum(b for b in bits if b is not None)

    def to_json(self) -> str:
        totals = {
            split: {f: self.total(split, f) for f in ("tokens", "documents", "bytes", "unknown")}
            | self._floor(split)
            for split in self.shards
        }
        return json.dumps(asdict(self) | {"totals": totals}, indent=2)

    def _floor(self, split: str) -> dict[str, float]:
        bits, size = self.ideal_bits(split), self.total(split, "bytes")
        return {"ideal_bits_per_byte": bits / size} if bits and size else {}


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a prepared folder; DataError if there is none or it is not valid."""
    path = folder / "manifest.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data.pop("totals")
        shards = {name: [Shard(**s) for s in rows] for name, rows in data.pop("shards").items()}
        manifest = Manifest(**data, shards=shards)
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}", "prepare the data with `dtt tokenize`"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(
            f"{path} is not a manifest", "run the same `dtt tokenize` with --force"
        ) from None
    if manifest.format != FORMAT:
        raise DataError(
            f"{path}: data format {manifest.format}, this dtt reads {FORMAT}",
            "run the same `dtt tokenize` with --force",
        )
    return manifest


def write_shard(
    folder: Path,
    name: str,
    tokens: NDArray[Any],
    document_ends: NDArray[np.uint64],
    **figures: Any,
) -> Shard:
    """Write one shard durably and return its row for the manifest."""
    file = f"{name}.bin"
    written = storage.write_stream_atomic(folder / file, _views(tokens))
    ends = storage.write_atomic(folder / f"{name}.docs", document_ends.astype("<u8").tobytes())
    return Shard(
        file=file,
        tokens=len(tokens),
        documents=len(document_ends),
        sha256=written.digest,
        docs_sha256=ends.digest,
        **figures,
    )


def _views(tokens: NDArray[Any]) -> Iterator[memoryview]:
    """The bytes of an array, not copied; of a memory map only a block is in memory at a time."""
    step = storage.BLOCK // tokens.itemsize
    backing: Any = tokens.base
    for start in range(0, len(tokens), step):
        yield memoryview(tokens[start : start + step]).cast("B")  # type: ignore[arg-type]
        if isinstance(backing, mmap.mmap):
            backing.madvise(mmap.MADV_DONTNEED)


class TokenStream:
    """A split as one sequence: an end-of-text token, then all shards' tokens in order.

    The leading token makes every token of the text a target, so that a loss summed over the
    stream is the information of the whole text. Opening costs a stat per shard; files are memory
    mapped when they are first read.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str, end_of_text: int) -> None:
        self.folder, self.manifest, self.split = folder, manifest, split
        self._end_of_text = end_of_text
        self._shards = manifest.shards[split]
        self._maps: dict[str, NDArray[Any]] = {}
        self._starts = [1]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + shard.tokens)
        for shard in dict.fromkeys(self._shards):
            self._check_size(shard)

    def _check_size(self, shard: Shard) -> None:
        path, dtype = self.folder / shard.file, np.dtype(self.manifest.dtype)
        try:
            size = path.stat().st_size
        except OSError:
            raise DataError(
                f"{path} is missing", "run the same `dtt tokenize` with --force"
            ) from None
        if size != shard.tokens * dtype.itemsize:
            raise DataError(
                f"{path} has {size} bytes instead of {shard.tokens * dtype.itemsize}",
                "run the same `dtt tokenize` with --force",
            )

    def _tokens(self, shard: Shard) -> NDArray[Any]:
        if shard.file not in self._maps:
            path, dtype = self.folder / shard.file, np.dtype(self.manifest.dtype)
            empty = not shard.tokens
            self._maps[shard.file] = np.empty(0, dtype) if empty else np.memmap(path, dtype, "r")
        return self._maps[shard.file]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Return tokens [start, start + length), fewer at the end of the stream, as int64.

        Raises DataError if one is beyond the vocabulary: the data is damaged.
        """
        stop = min(start + length, len(self))
        out = np.empty(max(stop - start, 0), np.int64)
        filled = 0
        if start == 0 and stop > 0:
            out[0] = self._end_of_text
            filled, start = 1, 1
        index = max(bisect.bisect_right(self._starts, start) - 1, 0)
        while start < stop:
            offset = start - self._starts[index]
            piece = self._tokens(self._shards[index])[offset : offset + stop - start]
            out[filled : filled + len(piece)] = piece
            filled, start, index = filled + len(piece), start + len(piece), index + 1
        if len(out) and out.max() >= self.manifest.vocab_size:
            place = stop - len(out) + int(out.argmax())
            raise DataError(
                f"{self.folder}: token {out.max()} at place {place} of the {self.split} split is "
                f"beyond the vocabulary ({self.manifest.vocab_size})",
                "the data is damaged: run the same `dtt tokenize` with --force",
            )
        return out

    def verify(self, most: int | None = None) -> None:
        """Check the SHA-256 of every shard; DataError names the first one that differs.

        A stream of more than `most` tokens is left unchecked.
        """
        if most is not None and len(self) > most:
            return
        for shard in self.manifest.shards[self.split]:
            path = self.folder / shard.file
            if storage.file_digest(path) != shard.sha256:
                raise DataError(
                    f"{path} is damaged: its SHA-256 is not the manifest's",
                    "run the same `dtt tokenize` with --force",
                )


class DocumentIndex:
    """Where the documents of a split lie in its stream: document i is tokens [start, stop).

    A document's last token is its end of text; one that the split's end cuts off has none, and
    counts too. A document that goes on in the next shard is one document. Opening costs a stat per
    shard; files are memory mapped when they are asked for.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        self.folder = folder
        self._shards = manifest.shards[split]
        self._maps: dict[str, NDArray[np.uint64]] = {}
        self._starts, self._firsts = [1], [0]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + shard.tokens)
            self._firsts.append(self._firsts[-1] + shard.documents)
        for shard in dict.fromkeys(self._shards):
            self._check_size(shard)
        self._ended = self._firsts[-1]
        last = self._end(self._ended - 1) if self._ended else 1
        self._count = self._ended + (last < self._starts[-1])

    def __len__(self) -> int:
        return self._count

    def bounds(self, number: int) -> tuple[int, int]:
        """Return (start, stop) of document `number` as stream positions."""
        if not 0 <= number < self._count:
            raise IndexError(number)
        return (self._end(number - 1) if number else 1), self._end(number)

    def at(self, position: int) -> int:
        """Return the number of the document that holds a stream position (the leading one: 0)."""
        index = max(bisect.bisect_right(self._starts, position) - 1, 0)
        if index == len(self._shards):
            raise IndexError(position)
        inside = position - self._starts[index]
        before = np.searchsorted(
            self._ends(self._shards[index]), np.uint64(max(inside, 0)), "right"
        )
        return self._firsts[index] + int(before)

    def blocks(self) -> Iterator[NDArray[np.int64]]:
        """Yield where the documents stop, as stream positions, in order, about a shard at a time.

        DataError if a file's ends do not rise.
        """
        last = 1
        for shard, start in zip(self._shards, self._starts, strict=False):
            ends = self._ends(shard)
            for first in range(0, len(ends), ENDS_AT_ONCE):
                stops = ends[first : first + ENDS_AT_ONCE].astype(np.int64) + start
                if not (np.diff(stops, prepend=last) > 0).all():
                    raise self._damaged(shard, "its document ends do not rise")
                last = int(stops[-1])
                yield stops
        if self._count > self._ended:
            yield np.array(self._starts[-1:], np.int64)

    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens of every document, end of text included: 8 bytes for each document."""
        stops = np.concatenate([np.ones(1, np.int64), *self.blocks()])
        return np.diff(stops)

    def digest(self) -> str:
        """A hash of where the documents lie, by what the manifest says of the files."""
        names = [shard.docs_sha256 for shard in self._shards]
        return hashlib.sha256(repr((names, self._starts[-1])).encode()).hexdigest()

    def verify(self, most: int | None = None) -> None:
        """Check the SHA-256 of every file; DataError names the first one that differs.

        The documents of a split of more than `most` tokens are left unchecked.
        """
        if most is not None and self._starts[-1] > most:
            return
        for shard in dict.fromkeys(self._shards):
            if storage.file_digest(self._path(shard)) != shard.docs_sha256:
                raise self._damaged(shard, "its SHA-256 is not the manifest's")

    def _end(self, number: int) -> int:
        if number == self._ended:
            return self._starts[-1]
        index = bisect.bisect_right(self._firsts, number) - 1
        return self._starts[index] + int(
            self._ends(self._shards[index])[number - self._firsts[index]]
        )

    def _ends(self, shard: Shard) -> NDArray[np.uint64]:
        if not shard.documents:
            return np.empty(0, np.uint64)
        if shard.file not in self._maps:
            ends = np.memmap(self._path(shard), dtype="<u8", mode="r")
            if ends[-1] > shard.tokens:
                raise self._damaged(shard, f"a document ends behind its {shard.tokens} tokens")
            self._maps[shard.file] = ends
        return self._maps[shard.file]

    def _path(self, shard: Shard) -> Path:
        return (self.folder / shard.file).with_suffix(".docs")

    def _check_size(self, shard: Shard) -> None:
        try:
            size = self._path(shard).stat().st_size
        except OSError:
            fix = "run the same `dtt tokenize` with --force"
            raise DataError(f"{self._path(shard)} is missing", fix) from None
        if size != 8 * shard.documents:
            raise self._damaged(shard, f"{size} bytes instead of {8 * shard.documents}")

    def _damaged(self, shard: Shard, how: str) -> DataError:
        return DataError(
            f"{self._path(shard)} is damaged: {how}", "run the same `dtt tokenize` with --force"
        )
