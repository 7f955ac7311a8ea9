"""Training a corpus's tokenizer, on a sample of its training documents.

A document is in the sample if its key, a hash of its place, is small: so the sample is spread over
all the text that is read, is the same however many processes read it, and its size is bounded.
"""

from __future__ import annotations

import hashlib
import heapq
import random
import re
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dtt.config.data import Bpe, Byte, Char
from dtt.data.preparation.encoding import PartAlphabet, training_documents
from dtt.data.preparation.workers import LocalWorkers, Workers, first_in_order, in_order
from dtt.data.progress import Advance, silent
from dtt.data.sources import Part, SourceReader
from dtt.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, train_bpe

PER_TOKEN, LARGEST_SAMPLE = 4_000, 100_000_000
"""Bytes to train on for each token of the vocabulary, where the settings do not say how many."""
SPARSENESS = 4
"""Up to so many times the sample's size is read, so that it comes from many documents."""
SPILL = 64 << 20
"""Bytes of the sample in memory; what is beyond waits on the disk."""
LONGEST_WORD = 256
"""Characters without a space (or spaces without a character) that are learned from as one word.
Longer runs are data in disguise, and each of their characters costs the trainer 50 bytes."""
LONG_RUN = re.compile(rf"\S{{{LONGEST_WORD}}}\S+|\s{{{LONGEST_WORD}}}\s+")
HALF_RUN = re.compile(rf"\S{{{LONGEST_WORD // 2}}}|\s{{{LONGEST_WORD // 2}}}")


def train_tokenizer(
    source: SourceReader,
    settings: Char | Byte | Bpe,
    parts: Sequence[Part],
    *,
    val_fraction: float,
    workers: Workers | None = None,
    advance: Advance = silent,
    scratch: Path | None = None,
) -> Tokenizer:
    """Return a tokenizer made from the training documents of `parts`.

    The same documents give the same tokenizer, whatever the workers. BPE needs memory in proportion
    to `train_bytes`, not to the corpus; beyond some MB the sample waits in a nameless file in
    `scratch` (default: the system's folder for these).
    """
    workers = workers or LocalWorkers()
    match settings:
        case Byte():
            return ByteTokenizer()
        case Char():
            found: set[str] = set()
            letters = in_order(workers, PartAlphabet(source, val_fraction), parts)
            for done, more in enumerate(letters, 1):
                advance("reading characters", done, len(parts))
                found |= more
            return CharTokenizer(found)
        case Bpe():
            most = settings.train_bytes or min(PER_TOKEN * settings.vocab_size, LARGEST_SAMPLE)
            sample = sampled_texts(source, parts, val_fraction, most, workers, advance, scratch)
            made = train_bpe(sample, settings.vocab_size, settings.special_tokens)
            advance("training the tokenizer", 1, 1)
            return made


class Smallest:
    """The items with the smallest keys whose sizes sum to at most `limit`.

    The same in whatever order they come.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self._held, self._ceiling = limit, 0, 1 << 64
        self._heap: list[tuple[int, int, Any]] = []

    def takes(self, key: int) -> bool:
        """Whether an item of that key has a place, if only for now."""
        return key < self._ceiling

    def add(self, key: int, size: int, item: Any) -> None:
        heapq.heappush(self._heap, (-key, size, item))
        self._held += size
        while self._held > self.limit:
            largest, less, _ = heapq.heappop(self._heap)
            self._ceiling, self._held = -largest, self._held - less

    def __iter__(self) -> Iterator[tuple[int, int, Any]]:
        """Yield (key, size, item), in no order."""
        return ((-key, size, item) for key, size, item in self._heap)


class PartTexts:
    """Reads a part's training documents, each cut to `limit` bytes.

    Returns their bytes, and of those that can be in the sample (key, size, text).
    """

    def __init__(self, source: SourceReader, val_fraction: float, limit: int) -> None:
        self.source, self.val_fraction, self.limit = source, val_fraction, limit

    def __call__(self, part: Part) -> tuple[int, list[tuple[int, int, bytes]]]:
        read, kept = 0, Smallest(self.limit)
        texts = training_documents(self.source, part, self.val_fraction)
        for place, text in enumerate(texts):
            utf8 = text.encode("utf-8", "replace")[: self.limit]
            read += len(utf8)
            key = _key(part.index, place)
            if kept.takes(key):
                kept.add(key, len(utf8), utf8)
        return read, list(kept)


def sampled_texts(
    source: SourceReader,
    parts: Sequence[Part],
    val_fraction: float,
    limit: int,
    workers: Workers,
    advance: Advance = silent,
    scratch: Path | None = None,
) -> Iterator[str]:
    """Yield training documents of together at most `limit` bytes, with long runs cut.

    All of them if they are no more; else those with the smallest keys of the parts, in a seeded
    order, that make up SPARSENESS times as much.
    """
    order, read, kept = list(parts), 0, Smallest(limit)
    random.Random(0).shuffle(order)
    function = PartTexts(source, val_fraction, limit)
    folder = None if scratch is None else str(scratch)
    with tempfile.SpooledTemporaryFile(SPILL, dir=folder) as file:
        with first_in_order(workers, function, order) as found:
            for number, (size, texts) in enumerate(found, 1):
                read += size
                for key, length, text in texts:
                    if kept.takes(key):
                        kept.add(key, length, file.tell())
                        file.write(text)
                advance("reading text to train on", number, len(order))
                if read >= SPARSENESS * limit:
                    break
        advance("training the tokenizer", 0, 0)
        for offset, length in sorted((offset, length) for _, length, offset in kept):
            file.seek(offset)
            yield from cut_long_runs(file.read(length).decode("utf-8", "ignore"))


def cut_long_runs(text: str) -> Iterator[str]:
    """Yield the text in pieces, without what is beyond LONGEST_WORD of a long run."""
    # A long run covers a whole aligned half of one: nearly all texts are through at once.
    if not any(HALF_RUN.match(text, i) for i in range(0, len(text), LONGEST_WORD // 2)):
        yield text
        return
    start = 0
    for run in LONG_RUN.finditer(text):
        yield text[start : run.start() + LONGEST_WORD]
        start = run.end()
    yield text[start:]


def _key(part: int, place: int) -> int:
    digest = hashlib.blake2b(struct.pack("<QQ", part, place), digest_size=8).digest()
    return int.from_bytes(digest, "little")
