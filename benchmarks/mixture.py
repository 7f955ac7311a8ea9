"""The loader with a mixture of four corpora whose documents do not see each other, and how soon a
corpus of ten billion tokens gives its first batch.

The large corpus is a sparse file with real document ends, so that starting has all of the work that
it would have with real text, but for reading the shards.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from loader import consumed
from shapes import QUICK, SHAPES, Shape
from table import median, note, parser, print_heading, print_table, ratio, summarize, time_calls

from dtt.data.loader import Loader
from dtt.data.mixture import Shares
from dtt.data.packing import PackedWindows
from dtt.data.shards import FORMAT, Manifest, Shard, TokenStream, write_shard
from dtt.data.windows import ContiguousWindows

END = 0
SHARES = (0.4, 0.3, 0.2, 0.1)
LARGE = 10_000_000_000
SHARD = 5_000_000
"""Tokens of a shard of the large corpus."""
DOCUMENT = 800
"""Tokens of a document, on average."""


def lengths(count: int, seed: int) -> Any:
    """Return lengths of documents that sum to about `count` tokens."""
    drawn = np.random.default_rng(seed).lognormal(0, 1, 2 * count // DOCUMENT)
    drawn = np.maximum(1, drawn * DOCUMENT / np.exp(0.5)).astype(np.int64)
    return drawn[: int(np.searchsorted(np.cumsum(drawn), count))]


def corpus(folder: Path, vocab: int, tokens: int, seed: int) -> TokenStream:
    """Write random documents as a prepared corpus of one shard."""
    ends = np.cumsum(lengths(tokens, seed))
    ids = np.random.default_rng(seed).integers(1, vocab, int(ends[-1])).astype("<u2")
    ids[ends - 1] = END
    folder.mkdir()
    figures: dict[str, Any] = {"bytes": len(ids), "unknown": 0, "bits": None}
    shard = write_shard(folder, "train-00000", ids, ends.astype(np.uint64), **figures)
    manifest = Manifest(FORMAT, {}, "", "<u2", vocab, shards={"train": [shard]})
    return TokenStream(folder, manifest, "train", END)


def mixture_speed(shape: Shape, folder: Path, tokens: int, seconds: float) -> float:
    """Return the target tokens/s of a loader that mixes packed and contiguous windows."""
    sources: list[Any] = []
    for index in range(len(SHARES)):
        stream = corpus(folder / str(index), shape.vocab, tokens, index)
        packed = index % 2 == 0
        sources.append(
            PackedWindows(stream, shape.context, END)
            if packed
            else ContiguousWindows(stream, shape.context, 0, END)
        )
    shares = Shares(SHARES, [None] * len(SHARES))
    batches = Loader(sources, shape.batch, 0, shares=shares).iter_from(0)
    counts: list[int] = []
    samples = time_calls(
        lambda: counts.append(next(batches).count), seconds=seconds, warmup=10, block=20
    )
    batches.close()
    return float(np.mean(counts) / median(samples))


def large_corpus(folder: Path, tokens: int) -> Manifest:
    """Write a corpus of so many tokens without using the disk for them."""
    shards, drawn = [], lengths(min(SHARD, tokens), 0)
    ends = np.cumsum(drawn).astype("<u8")
    size, digest = int(ends[-1]), hashlib.sha256(ends.tobytes()).hexdigest()
    for number in range(tokens // size):
        name = f"train-{number:05d}"
        with (folder / f"{name}.bin").open("wb") as file:
            file.truncate(2 * size)
        (folder / f"{name}.docs").write_bytes(ends.tobytes())
        shards.append(Shard(f"{name}.bin", size, len(ends), size, 0, "", digest, None))
    return Manifest(FORMAT, {}, "", "<u2", 50257, shards={"train": shards})


def first_batch(folder: Path, manifest: Manifest, shape: Shape, *, packed: bool) -> float:
    """Return the seconds from a manifest in memory to the first batch."""
    begin = time.perf_counter()
    stream = TokenStream(folder, manifest, "train", END)
    windows: Any = (
        PackedWindows(stream, shape.context, END)
        if packed
        else ContiguousWindows(stream, shape.context, 0, END)
    )
    batches = Loader([windows], shape.batch, 0).iter_from(0)
    next(batches)
    seconds = time.perf_counter() - begin
    batches.close()
    return seconds


def main() -> None:
    options = parser(__doc__).parse_args()
    quick = options.quick
    shape = QUICK if quick else SHAPES["gpt2-124m"]
    print_heading("Mixture", options.threads, quick)
    with tempfile.TemporaryDirectory() as name:
        speed = mixture_speed(
            shape, Path(name), 20_000 if quick else 5_000_000, 0.2 if quick else 5
        )
    note("a training step of the same shape ...")
    step = consumed(shape, options.threads, 0.2 if quick else 10)
    rows = [["4 corpora, documents apart", speed, step, ratio(speed, step)]]
    print_table(["loader", "tokens/s", "step, tokens/s", "ratio"], rows)
    summarize("loader, 4 corpora, documents apart, to a step of 124M", ratio(speed, step), "20x")
    tokens = 1_000_000 if quick else LARGE
    with tempfile.TemporaryDirectory() as name:
        manifest = large_corpus(Path(name), tokens)
        documents = manifest.total("train", "documents")
        rows = [
            ["contiguous", first_batch(Path(name), manifest, shape, packed=False)],
            ["packed, the first time", first_batch(Path(name), manifest, shape, packed=True)],
            ["packed, again", first_batch(Path(name), manifest, shape, packed=True)],
        ]
    print(f"{manifest.total('train', 'tokens'):,} tokens in {documents:,} documents\n")
    rows = [[what, f"{seconds:.2f} s"] for what, seconds in rows]
    print_table(["windows", "first batch after"], rows)
    for (what, seconds), wanted in zip(rows, ("1 s", "reported", "1 s"), strict=True):
        summarize(f"first batch of {tokens:,} tokens, {what}", seconds, wanted)


if __name__ == "__main__":
    main()
