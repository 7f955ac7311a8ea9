"""Figures of a prepared corpus: how long its documents are, which repeat, which tokens it uses.

What the manifest and the documents' ends say is exact at any size. What needs every token is exact
up to a limit, and beyond it comes from a seeded sample, which the result says. Memory is bounded by
the vocabulary, the sample, and the number of different lengths, which is at most the square root of
twice the corpus's tokens.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dtt.data.inspection.scanning import Scan
from dtt.data.order import mix
from dtt.data.shards import DocumentIndex, Manifest

I64 = NDArray[np.int64]
SAMPLE = 500_000_000
"""Tokens of a split that are read at most, unless told."""
BLOCK = 1 << 20
"""Tokens that are read at a time."""
SEED = 0


@dataclass(frozen=True)
class Lengths:
    """How many documents have which length, in tokens with the end of text."""

    values: I64
    """The lengths that occur, rising."""
    counts: I64

    @property
    def documents(self) -> int:
        return int(self.counts.sum())

    @property
    def spread(self) -> float:
        """The longest over the shortest."""
        return float(self.values[-1] / self.values[0])

    def quantile(self, share: float) -> int:
        """Return the least length that at least this share of the documents does not exceed."""
        place = np.searchsorted(np.cumsum(self.counts), share * self.documents)
        return int(self.values[min(int(place), len(self.values) - 1)])


def count_lengths(index: DocumentIndex) -> Lengths:
    """Count the lengths of a split's documents, exactly."""
    found: Counter[int] = Counter()
    last = 1
    for stops in index.blocks():
        values, counts = np.unique(np.diff(stops, prepend=last), return_counts=True)
        found.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        last = int(stops[-1])
    values = np.array(sorted(found), np.int64)
    return Lengths(values, np.array([found[length] for length in values.tolist()], np.int64))


def histogram(lengths: Lengths, rows: int = 16) -> list[tuple[int, int, int]]:
    """Return at most `rows` of (from, to, documents), in equal steps of the logarithm."""
    edges = _edges(lengths, rows)
    places = np.searchsorted(lengths.values, edges)
    sums = np.concatenate([[0], np.cumsum(lengths.counts)])[places]
    return [
        (low, high - 1, count)
        for (low, high), count in zip(pairwise(edges.tolist()), np.diff(sums).tolist(), strict=True)
    ]


def _edges(lengths: Lengths, rows: int) -> I64:
    """Whole numbers that divide the lengths, the largest included."""
    first, last = int(lengths.values[0]), int(lengths.values[-1]) + 1
    return np.unique(np.geomspace(first, last, rows + 1).round().astype(np.int64))


@dataclass(frozen=True)
class Usage:
    """How often each token occurs in what was read of a split."""

    counts: I64
    read: int
    exact: bool

    @property
    def entropy(self) -> float:
        """Information of a token drawn alone, in bits: what knowing only frequencies leaves."""
        shares = self.counts[self.counts > 0] / self.read
        return float(-(shares * np.log2(shares)).sum())


def count_tokens(stream: Scan, vocab_size: int, most: int, seed: int = SEED) -> Usage:
    """Count the tokens of a split, or of about `most` of them, in blocks chosen by `seed`."""
    total = len(stream) - 1
    blocks = -(-total // BLOCK)
    wanted = max(1, most // BLOCK)
    chosen = np.arange(blocks)
    if total > most and blocks > wanted:
        chosen = np.sort(np.random.default_rng(seed).choice(blocks, wanted, replace=False))
    counts, read = np.zeros(vocab_size, np.int64), 0
    for block in chosen.tolist():
        ids = stream.read(1 + block * BLOCK, BLOCK)
        counts += np.bincount(ids, minlength=vocab_size)
        read += len(ids)
    return Usage(counts, read, len(chosen) == blocks)


@dataclass(frozen=True)
class Repeats:
    """Documents whose tokens are those of an earlier one."""

    repeats: int
    """Documents beyond the first of each kind."""
    tokens: int
    """Their tokens."""
    groups: list[tuple[int, int]]
    """The most frequent documents: (copies, number of the first), at most five."""
    kinds: NDArray[np.uint64]
    """Hashes of the different documents, rising."""
    counts: I64
    """Documents of each kind."""

    @property
    def searched(self) -> int:
        """Documents that were compared."""
        return int(self.counts.sum())

    def found_in(self, other: Repeats) -> int:
        """Return how many of these documents are also among the others."""
        return int(self.counts[np.isin(self.kinds, other.kinds)].sum())


def sample_lengths(lengths: Lengths, most: int, seed: int = SEED) -> I64:
    """Choose lengths whose documents have together at most `most` tokens, in an order by `seed`.

    Equal documents have equal lengths, so a sample of whole lengths has both of a pair or neither:
    the share of repeats in it is that of the corpus, which a sample of documents would not show.
    A length whose documents do not fit any more is passed over.
    """
    sizes = lengths.values * lengths.counts
    if int(sizes.sum()) <= most:
        return lengths.values
    order = sorted(range(len(sizes)), key=lambda i: mix(seed, int(lengths.values[i])))
    chosen, taken = [], 0
    for place in order:
        if taken + int(sizes[place]) <= most:
            chosen.append(int(lengths.values[place]))
            taken += int(sizes[place])
    return np.array(sorted(chosen), np.int64)


def find_repeats(stream: Scan, index: DocumentIndex, chosen: I64, copies: int) -> Repeats:
    """Compare the documents of the chosen lengths by a 64-bit hash of their tokens.

    Only the first of `copies` equal parts of the split is read: `data.repeat` wrote the others.
    """
    digests, numbers, sizes = array("Q"), array("q"), array("q")
    for number, size, digest in _digests(stream, index, chosen, len(index) // copies):
        digests.append(digest)
        numbers.append(number)
        sizes.append(size)
    kinds, firsts, counts = np.unique(
        np.array(digests, np.uint64), return_index=True, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")[:5]
    return Repeats(
        repeats=len(digests) - len(kinds),
        tokens=sum(sizes) - int(np.array(sizes, np.int64)[firsts].sum()),
        groups=[(int(counts[i]), numbers[int(firsts[i])]) for i in order if counts[i] > 1],
        kinds=kinds,
        counts=counts,
    )


def _digests(
    stream: Scan, index: DocumentIndex, chosen: I64, limit: int
) -> Iterator[tuple[int, int, int]]:
    """Yield (number, tokens, hash) of those of the first `limit` documents with chosen lengths."""
    number, last = 0, 1
    for block in index.blocks():
        stops = block[: limit - number]
        starts = np.concatenate([[last], stops])[:-1]
        mine = np.flatnonzero(np.isin(stops - starts, chosen))
        documents = zip(
            (mine + number).tolist(), starts[mine].tolist(), stops[mine].tolist(), strict=True
        )
        yield from _hash(stream, list(documents))
        number, last = number + len(stops), int(block[-1])


def _hash(stream: Scan, documents: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Hash documents (number, start, stop); those that follow each other are read at once."""
    place = 0
    while place < len(documents):
        first, end = documents[place][1], place + 1
        while (
            end < len(documents)
            and documents[end][1] == documents[end - 1][2]
            and documents[end][2] - first <= BLOCK
        ):
            end += 1
        stop = documents[end - 1][2]
        data = stream.read(first, min(stop - first, BLOCK)).astype("<u4").tobytes()
        for number, a, b in documents[place:end]:
            digest = hashlib.blake2b(data[4 * (a - first) : 4 * (b - first)], digest_size=8)
            for rest in range(first + BLOCK, stop, BLOCK):  # of a document longer than a block
                digest.update(stream.read(rest, min(BLOCK, stop - rest)).astype("<u4").tobytes())
            yield number, b - a, int.from_bytes(digest.digest(), "little")
        place = end


def copies_of(manifest: Manifest, split: str) -> int:
    """Return how often the split's text was written (`data.repeat`)."""
    files = [shard.file for shard in manifest.shards[split]]
    return len(files) // max(1, len(set(files)))
