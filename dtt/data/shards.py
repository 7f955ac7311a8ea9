"""Token shards on disk, and the stream of tokens that they form.

A prepared corpus is a folder: manifest.json, tokenizer.json, and per part and split a file of
little-endian uint16 or uint32 token ids (`train-00000.bin`) with one of document ends
(`train-00000.docs`, uint64: tokens up to and including the end-of-text token). Files are memory
mapped and never change.
"""

from __future__ import annotations

import bisect
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtt import storage
from dtt.errors import DataError

FORMAT = 1
SPLITS = ("train", "val")


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
    shards: dict[str, list[Shard]] = field(default_factory=dict)

    def total(self, split: str, figure: str) -> int:
        """Sum of a figure ("tokens", "documents", "bytes", "unknown") over a split."""
        return sum(getattr(shard, figure) for shard in self.shards[split])

    def ideal_bits(self, split: str) -> float | None:
        """Exact information of the split's text in bits, if the source knows it."""
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
        raise DataError(f"{path} is not a manifest", "run `dtt tokenize --force`") from None
    if manifest.format != FORMAT:
        raise DataError(
            f"{path}: data format {manifest.format}, this dtt reads {FORMAT}",
            "run `dtt tokenize --force`",
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
    written = storage.write_atomic(folder / file, tokens.tobytes())
    ends = storage.write_atomic(folder / f"{name}.docs", document_ends.astype("<u8").tobytes())
    return Shard(
        file=file,
        tokens=len(tokens),
        documents=len(document_ends),
        sha256=written.sha256,
        docs_sha256=ends.sha256,
        **figures,
    )


class TokenStream:
    """A split as one sequence: an end-of-text token, then all shards' tokens in order.

    The leading token makes every token of the text a target, so that a loss summed over the
    stream is the information of the whole text.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str, end_of_text: int) -> None:
        self.folder, self.manifest, self.split = folder, manifest, split
        self._end_of_text = end_of_text
        self._maps: list[NDArray[Any]] = []
        self._starts = [1]
        for shard in manifest.shards[split]:
            self._maps.append(self._map(shard))
            self._starts.append(self._starts[-1] + shard.tokens)

    def _map(self, shard: Shard) -> NDArray[Any]:
        path, dtype = self.folder / shard.file, np.dtype(self.manifest.dtype)
        try:
            size = path.stat().st_size
        except OSError:
            raise DataError(f"{path} is missing", "run `dtt tokenize --force`") from None
        if size != shard.tokens * dtype.itemsize:
            raise DataError(
                f"{path} has {size} bytes instead of {shard.tokens * dtype.itemsize}",
                "run `dtt tokenize --force`",
            )
        if not size:
            return np.empty(0, dtype)
        return np.memmap(path, dtype=dtype, mode="r")

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Return tokens [start, start + length), fewer at the end of the stream, as int64."""
        stop = min(start + length, len(self))
        out = np.empty(max(stop - start, 0), np.int64)
        filled = 0
        if start == 0 and stop > 0:
            out[0] = self._end_of_text
            filled, start = 1, 1
        index = max(bisect.bisect_right(self._starts, start) - 1, 0)
        while start < stop:
            offset = start - self._starts[index]
            piece = self._maps[index][offset : offset + stop - start]
            out[filled : filled + len(piece)] = piece
            filled, start, index = filled + len(piece), start + len(piece), index + 1
        return out

    def verify(self, most: int | None = None) -> None:
        """Check the SHA-256 of every shard; DataError names the first one that differs.

        A stream of more than `most` tokens is left unchecked.
        """
        if most is not None and len(self) > most:
            return
        for shard in self.manifest.shards[self.split]:
            path = self.folder / shard.file
            if storage.sha256(path) != shard.sha256:
                raise DataError(
                    f"{path} is damaged: its SHA-256 is not the manifest's",
                    "run `dtt tokenize --force`",
                )
