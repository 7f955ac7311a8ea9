"""Which documents were there before, exactly or nearly.

Each document gets a signature when it is read; when all have one, the decision is made: the first
of equal documents in the corpus's order stays. It does not depend on how many workers read them.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dtt.config.cleaning import ExactDedup, NearDedup
from dtt.data.cleaning.shingles import MULTIPLIER, mixed, ngram_hashes, word_hashes, words
from dtt.data.cleaning.step import missing_package
from dtt.errors import DataError

Signatures = Sequence[NDArray[Any]]
"""The signatures of each part of a corpus, memory mapped."""
Mask = NDArray[np.bool_]


class CorpusStep(Protocol):
    """A step that judges a document by all others."""

    reason: str

    def signature(self, text: str) -> Any | None:
        """Return what others are compared with, or None: the text is like no other."""

    def pack(self, signatures: list[Any]) -> NDArray[Any]:
        """Return the signatures of a part's documents as one array for a file."""

    def repeated(self, parts: Signatures, chosen: Mask) -> Mask:
        """Return which documents are like an earlier one, only those that are `chosen` counting."""


class ExactDuplicates:
    """Finds equal texts by 128 bits of BLAKE2b: by chance, two differing texts out of 10^10 are
    taken for equal with a probability of 10^-19. The decision takes 48 bytes of memory a document.
    """

    reason = "a duplicate"

    def __init__(self, settings: ExactDedup) -> None:
        self.settings = settings

    def signature(self, text: str) -> bytes:
        if self.settings.fold:
            text = " ".join(words(text)) or text
        return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()

    def pack(self, signatures: list[bytes]) -> NDArray[np.uint64]:
        return np.frombuffer(b"".join(signatures), "<u8").reshape(-1, 2)

    def repeated(self, parts: Signatures, chosen: Mask) -> Mask:
        index = np.flatnonzero(chosen)
        keys = np.concatenate([np.asarray(part) for part in parts])[index]
        order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of equal keys the earliest is first
        keys = keys[order]
        again = np.zeros(len(chosen), bool)
        again[index[order[1:]]] = (keys[1:] == keys[:-1]).all(1)
        return again


class NearDuplicates:
    """Finds texts that have most of their n-grams in common: MinHash (Broder 1997) with LSH.

    Signatures are those of `rensa`: 4 bytes for each of bands x rows hashes on disk. Documents that
    agree in all rows of a band are candidates; with `similarity`, the share of all hashes in which
    they agree, which estimates their Jaccard similarity, must reach it. Duplicates of duplicates
    are duplicates. The decision takes about 100 bytes of memory a document, and 16 more for each
    pair of candidates.
    """

    reason = "nearly a duplicate"
    ALGORITHM = 2
    """The version of rensa's hashes; other versions find slightly other documents."""

    def __init__(self, settings: NearDedup) -> None:
        self.settings = settings
        self.hashes = settings.bands * settings.rows
        self._digest: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_digest": None}

    def signature(self, text: str) -> list[int] | None:
        grams = ngram_hashes(word_hashes(text), self.settings.ngram)
        if not len(grams):
            return None
        self._digest = self._digest or _rensa()
        edges = np.array([0, len(grams)], np.uint64)
        # One document a call: rensa spreads large batches over threads, and workers are enough.
        rows: list[list[int]] = self._digest(
            grams, edges, self.hashes, self.settings.seed
        ).to_rows()
        return rows[0]

    def pack(self, signatures: list[list[int]]) -> NDArray[np.uint32]:
        shape = (len(signatures), self.settings.bands, self.settings.rows)
        # A band's hashes of all documents lie together: they are read band by band.
        return np.ascontiguousarray(np.array(signatures, "<u4").reshape(shape).swapaxes(0, 1))

    def repeated(self, parts: Signatures, chosen: Mask) -> Mask:
        index = np.flatnonzero(chosen)
        masks = np.split(chosen, np.cumsum([part.shape[1] for part in parts])[:-1])
        bands = [partial(_band, parts, band, masks) for band in range(self.settings.bands)]
        count = len(index)
        codes = np.empty(0, np.int64)  # of pairs: first * count + other
        for hashes in bands:
            codes = np.union1d(codes, self._candidates(hashes()))
        pairs = np.stack(np.divmod(codes, max(count, 1)), 1)
        if self.settings.similarity is not None:
            agreeing = np.zeros(len(pairs), np.int64)
            for hashes in bands:
                both = hashes()[pairs]
                agreeing += (both[:, 0] == both[:, 1]).sum(1)
            pairs = pairs[agreeing >= self.settings.similarity * self.hashes]
        again = np.zeros(len(chosen), bool)
        again[index] = _first_of_each_group(count, pairs) != np.arange(count)
        return again

    def _candidates(self, hashes: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Return codes of the pairs of documents whose hashes [documents, rows] are equal."""
        keys = np.zeros(len(hashes), np.uint64)
        for row in range(hashes.shape[1]):
            keys = mixed(keys * np.uint64(MULTIPLIER) + hashes[:, row])
        order = np.argsort(keys, kind="stable")
        begins = np.diff(keys[order], prepend=keys[order[:1]] + np.uint64(1)) != 0
        first = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
        return (first * len(order) + order)[~begins]


def _band(parts: Signatures, band: int, masks: list[Mask]) -> NDArray[np.uint32]:
    chosen = [part[band][mask] for part, mask in zip(parts, masks, strict=True)]
    return np.concatenate(chosen)


def _first_of_each_group(count: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each document the smallest that pairs connect it with, itself included."""
    label = np.arange(count)
    while True:
        before = label.copy()
        smaller = label[pairs].min(1)
        np.minimum.at(label, pairs[:, 0], smaller)
        np.minimum.at(label, pairs[:, 1], smaller)
        label = label[label]
        if (label == before).all():
            return label


def _rensa() -> Any:
    try:
        digest = importlib.import_module("rensa").RMinHash
    except ImportError:
        raise missing_package("rensa", "near-dedup") from None
    version = getattr(digest, "ALGORITHM_VERSION", None)
    if version != NearDuplicates.ALGORITHM:
        raise DataError(
            f"data.cleaning: near-dedup needs version {NearDuplicates.ALGORITHM} of rensa's "
            f"hashes, the installed package has {version}",
            'pip install "rensa>=0.5,<0.6"',
        )
    return digest.digest_matrix_from_flat_token_hashes
