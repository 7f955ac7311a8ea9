"""A source whose documents are cleaned as they are read.

Steps that judge a document by all others take a pass over the corpus first: `sign` for each part,
in any process, and then one `decide` (dtt/data/cleaning/scan.py does both).
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtt import storage
from dtt.config.cleaning import Step
from dtt.data.cleaning.chain import Chain, Judge, Outcome
from dtt.data.documents import Document, Part, SourceReader
from dtt.errors import DataError

DECISION, SIGNATURES = "decision.npz", "signatures"


class CleanedReader:
    """The documents of `source` that the steps leave, as they leave them.

    `bad` counts what each step removed and changed, beside what the source counts. The pieces of a
    long document are cleaned one by one, and not compared with anything. Decisions are kept in a
    folder below `home` whose name holds a hash of all that they depend on, so that they are found
    again, by a corpus with another tokenizer, too.
    """

    def __init__(self, source: SourceReader, settings: Sequence[Step], home: Path) -> None:
        self.source, self.chain = source, Chain(settings)
        self.bad: Counter[str] = source.bad
        self._home = self.folder = home

    def documents(self) -> int | None:
        """Number of documents before cleaning."""
        return self.source.documents()

    def fingerprint(self) -> dict[str, Any]:
        return self._fingerprint

    def parts(self, tail: float) -> list[Part]:
        parts = self.source.parts(tail)
        if self.chain.corpus_wide:
            cuts = [
                [p.start, p.stop, [[q.start, q.stop, *(q.share or ())] for q in p.pieces]]
                for p in parts
            ]
            spec = json.dumps([self._fingerprint, cuts], sort_keys=True)
            self.folder = self._home / hashlib.sha256(spec.encode()).hexdigest()[:12]
        return parts

    def read(self, part: Part) -> Iterator[Document]:
        for number, document in enumerate(self.source.read(part)):

            def judge(step: int, text: str, number: int = number) -> bool:
                return self._decision.dropped(step, part.index, number)

            outcome = self._apply(document, judge)
            self.chain.count(outcome, self.bad)
            if outcome.text is None:
                if document.key is not None and document.ends:  # what is left of it ends here
                    yield replace(document, text="", bits=None)
            elif outcome.changed:
                yield replace(document, text=outcome.text, bits=None)
            else:
                yield document

    def _apply(self, document: Document, judge: Judge) -> Outcome:
        """Apply the steps to a document; those that compare documents pass pieces over."""
        piece = document.key is not None
        if piece and not document.text:
            return Outcome("")
        return self.chain.apply(document.text, (lambda step, text: False) if piece else judge)

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return {"source": self.source.fingerprint(), "cleaning": self.chain.fingerprint()}

    # --- the pass before, for steps that judge a document by all others ---------------------------

    def decided(self) -> bool:
        """Whether the documents can be read: nothing has to be decided, or it is."""
        return not self.chain.corpus_wide or (self.folder / DECISION).exists()

    def signed(self, part: Part) -> bool:
        """Whether the signatures of a part are there."""
        return _index_path(self.folder, part.index).exists()

    def sign(self, part: Part) -> None:
        """Write the signatures of a part, one file a step, and last which documents have them.

        Twice does no harm: the same bytes are put in the same place.
        """
        if self.decided():  # by other processes, which took this one for dead
            return
        storage.make_folder(self.folder / SIGNATURES)
        steps = self.chain.corpus_wide
        numbers: dict[int, list[int]] = {step: [] for step in steps}
        signatures: dict[int, list[Any]] = {step: [] for step in steps}
        count = 0
        for count, document in enumerate(self.source.read(part), 1):

            def note(step: int, text: str, number: int = count - 1) -> bool:
                signature = steps[step].signature(text)
                if signature is not None:
                    numbers[step].append(number)
                    signatures[step].append(signature)
                return False

            self._apply(document, note)
        for step, found in signatures.items():
            path = _signature_path(self.folder, part.index, step)
            storage.write_atomic(path, _bytes(np.save, steps[step].pack(found)))
        named = {f"numbers_{step}": np.array(found, "<i8") for step, found in numbers.items()}
        index = _bytes(np.savez, count=np.int64(count), **named)
        storage.write_atomic(_index_path(self.folder, part.index), index)

    def decide(self, parts: int) -> None:
        """Decide from the signatures of all `parts`, and write a bit for each document and step."""
        try:
            dropped = self._dropped(parts)
        except FileNotFoundError:
            if self.decided():  # by another process, which has removed the signatures
                return
            raise
        storage.write_atomic(self.folder / DECISION, _bytes(np.savez, **dropped))
        storage.remove(self.folder / SIGNATURES)

    def sweep(self) -> None:
        """Remove what a process that was killed right after the decision has left."""
        shutil.rmtree(self.folder / SIGNATURES, ignore_errors=True)

    def _dropped(self, parts: int) -> dict[str, NDArray[Any]]:
        indices = [_load(_index_path(self.folder, part)) for part in range(parts)]
        counts = np.array([index["count"] for index in indices])
        starts = np.cumsum(counts) - counts
        alive = np.ones(int(counts.sum()), bool)
        dropped = {"starts": starts}
        for step, judge in self.chain.corpus_wide.items():
            found = zip(indices, starts, strict=True)
            numbers = np.concatenate([index[f"numbers_{step}"] + start for index, start in found])
            signatures = [
                np.load(_signature_path(self.folder, part, step), mmap_mode="r")
                for part in range(parts)
            ]
            again = numbers[judge.repeated(signatures, alive[numbers])]
            alive[again] = False
            mask = np.zeros(len(alive), bool)
            mask[again] = True
            dropped[f"dropped_{step}"] = np.packbits(mask)
        return dropped

    @cached_property
    def _decision(self) -> _Decision:
        return _Decision(self.folder / DECISION)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_decision"}


class _Decision:
    """Which documents the corpus-wide steps leave out."""

    def __init__(self, path: Path) -> None:
        arrays = _load(path)
        self._starts = arrays["starts"]
        self._bits = {
            int(name.removeprefix("dropped_")): bits
            for name, bits in arrays.items()
            if name.startswith("dropped_")
        }

    def dropped(self, step: int, part: int, number: int) -> bool:
        place = int(self._starts[part]) + number
        return bool(self._bits[step][place >> 3] >> (7 - (place & 7)) & 1)


def _index_path(folder: Path, part: int) -> Path:
    return folder / SIGNATURES / f"part-{part:05d}.npz"


def _signature_path(folder: Path, part: int, step: int) -> Path:
    return folder / SIGNATURES / f"part-{part:05d}-{step}.npy"


def _bytes(save: Callable[..., None], *arrays: Any, **named: Any) -> bytes:
    """Return what numpy's `save` or `savez` would write."""
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


def _load(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    # What zipfile and numpy raise for damaged files is a long list.
    except (ValueError, EOFError, OSError, RuntimeError, KeyError, zipfile.BadZipFile):
        fix = f"remove the folder {path.parent} and run the command again"
        raise DataError(f"{path} is damaged", fix) from None
