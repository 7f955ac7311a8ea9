"""Documents to token shards: in parallel, resumable per part, the same bytes for any number of
workers.

The folder's name holds a hash of everything that the result depends on, so prepared data is found
again, and is never mistaken for data of another text, tokenizer or split.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dtt import storage
from dtt.config.data import Data, TokenizerFile
from dtt.config.data import Tokenizer as TokenizerSettings
from dtt.config.sources import Text, source_label
from dtt.data.cleaning.chain import tally
from dtt.data.cleaning.scan import cleaned, find_duplicates
from dtt.data.preparation.board import Board, make_parts
from dtt.data.preparation.crew import Crew
from dtt.data.preparation.encoding import PartEncoder, is_finished, read_row
from dtt.data.preparation.sample import train_tokenizer
from dtt.data.preparation.verdict import refuse_empty, warnings
from dtt.data.preparation.workers import LocalWorkers, Workers
from dtt.data.progress import Advance, silent
from dtt.data.shards import (
    FORMAT,
    SPLITS,
    DocumentIndex,
    Manifest,
    Shard,
    TokenStream,
    read_manifest,
)
from dtt.data.sources import Part, SourceReader, open_source
from dtt.errors import DataError
from dtt.tokenizer import Tokenizer, fingerprint, load_tokenizer, named_end

DOCUMENTS_FOR_SPLIT = 20
"""With fewer documents than this a split by document says little; `auto` takes the tail."""

VERIFIED_TOKENS = 200_000_000
"""Prepared data of up to so many tokens is hashed each time it is opened: a second at most."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: its folder, manifest and tokenizer."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    found: bool = False
    """Whether it was there before it was asked for."""

    def stream(self, split: str) -> TokenStream:
        """Return the tokens of "train" or "val"."""
        return TokenStream(self.folder, self.manifest, split, self.tokenizer.end_of_text)

    def verify(self, split: str) -> None:
        """Check the SHA-256 of a split of up to VERIFIED_TOKENS; DataError if a file differs."""
        self.stream(split).verify(VERIFIED_TOKENS)
        DocumentIndex(self.folder, self.manifest, split).verify(VERIFIED_TOKENS)


@dataclass(frozen=True)
class Plan:
    """What is to be made; a pure function of the settings and the text."""

    data: Data
    source: SourceReader
    parts: list[Part]
    folder: Path
    spec: dict[str, Any]
    given: Tokenizer | None
    """The tokenizer, where the settings name a file."""


def open_corpus(folder: Path) -> Corpus:
    """Open a prepared folder; DataError if it is incomplete or its tokenizer is another one."""
    manifest = read_manifest(folder)
    tokenizer = _own_tokenizer(folder, manifest.spec)
    if fingerprint(tokenizer) != manifest.tokenizer:
        raise DataError(
            f"{folder}/tokenizer.json is not the tokenizer that made these tokens",
            "run the same `dtt tokenize` with --force",
        )
    return Corpus(folder, manifest, tokenizer)


def _own_tokenizer(folder: Path, spec: dict[str, Any]) -> Tokenizer:
    try:
        return load_tokenizer(folder / "tokenizer.json", named_end(spec["tokenizer"]))
    except DataError as error:
        raise DataError(error.what, "run the same `dtt tokenize` with --force") from None


def prepare(
    data: Data,
    tokenizer: TokenizerSettings,
    *,
    force: bool = False,
    report: Report = lambda line: None,
    advance: Advance = silent,
    crew: Crew | None = None,
    workers: Workers | None = None,
) -> Corpus:
    """Return the prepared corpus of these settings, making what is missing of it.

    `report` gets warnings as lines. All processes that want the same corpus at a time share the
    work; `crew` holds together the ranks of a launch. Killed at any moment and started again, it
    continues with the parts that are missing. With `force` the old data is removed first, once.
    """
    plan = plan_corpus(data, tokenizer)
    workers = workers or LocalWorkers(data.workers)
    with contextlib.ExitStack() as stack:
        crew = crew or stack.enter_context(Crew(data.dir))
        if force or not crew.alone or not is_finished(plan.folder):
            at_once = force and not crew.array
            crew.meet(plan.folder.name, lambda: _make_room(plan, crew) if at_once else None)
        if force and crew.array:  # tasks start when they can: the first of them does it
            crew.once("force", lambda: _is_forced(plan, crew), lambda: _make_room(plan, crew))
        if not is_finished(plan.folder):
            try:
                _make(plan, tokenizer, crew, workers, advance)
            except BaseException:
                with contextlib.suppress(OSError):  # unless something is in it that is of use
                    plan.folder.rmdir()
                raise
            corpus = open_corpus(plan.folder)
            if crew.speaks:
                for line in warnings(corpus.manifest):
                    report(line)
            return corpus
        return _open_finished(plan, crew)


def _open_finished(plan: Plan, crew: Crew) -> Corpus:
    _sweep(plan.folder)  # what a process left that died at the very end
    crew.forget(plan.folder.name)
    corpus = replace(open_corpus(plan.folder), found=True)
    if crew.speaks:
        for name in SPLITS:
            corpus.verify(name)
    return corpus


def _make(
    plan: Plan,
    settings: TokenizerSettings,
    crew: Crew,
    workers: Workers,
    advance: Advance,
) -> None:
    """Make what is missing of the corpus, with all who work on it; return when it is finished."""
    folder = plan.folder
    storage.make_folder(folder)
    find_duplicates(plan.source, plan.parts, crew, workers, advance)
    path = folder / "tokenizer.json"
    crew.once(
        "tokenizer",
        path.exists,
        lambda: _make_tokenizer(plan, settings, workers, advance),
        lambda: advance("waiting for the tokenizer", 0, 0),
    )
    tokenizer = _own_tokenizer(folder, plan.spec)
    encoder = PartEncoder(plan.source, tokenizer, folder, plan.data.val_fraction)
    while not is_finished(folder):
        board = Board(folder, plan.parts, crew, encoder.dtype.itemsize)
        make_parts(board, encoder, workers, crew, advance)
        crew.once(
            "manifest",
            lambda: is_finished(folder),
            lambda: _finish(plan, encoder, crew),
        )


def _make_tokenizer(
    plan: Plan, settings: TokenizerSettings, workers: Workers, advance: Advance
) -> None:
    if isinstance(settings, TokenizerFile):
        assert plan.given is not None
        made = plan.given
    else:
        made = train_tokenizer(
            plan.source,
            settings,
            plan.parts,
            val_fraction=plan.data.val_fraction,
            workers=workers,
            advance=advance,
            scratch=plan.folder,
        )
    storage.write_atomic(plan.folder / "tokenizer.json", made.to_json())


def _finish(plan: Plan, encoder: PartEncoder, crew: Crew) -> None:
    """Write the manifest, if all parts are there, and remove what was there to make it."""
    read = (read_row(plan.folder, part.index, encoder.dtype.itemsize) for part in plan.parts)
    rows = [row for row in read if row is not None]
    if len(rows) < len(plan.parts):
        return
    manifest = _manifest(plan, encoder.tokenizer, rows)
    try:
        refuse_empty(manifest)
    except DataError:
        if crew.is_last():  # nobody needs what was made for nothing
            storage.remove(plan.folder)
            crew.forget()
        raise
    storage.write_atomic(plan.folder / "manifest.json", manifest.to_json())
    _sweep(plan.folder)
    crew.forget()


def _sweep(folder: Path) -> None:
    """Remove from a finished corpus what was there to make it."""
    for path in (*folder.glob("part-*.json"), *folder.glob(".*.tmp")):
        path.unlink(missing_ok=True)


def plan_corpus(data: Data, tokenizer: TokenizerSettings) -> Plan:
    source = cleaned(open_source(data.source, data.dir), data.cleaning, data.dir / "cleaning")
    count, split = source.documents(), data.split
    if split == "auto":
        few = count is not None and count < DOCUMENTS_FOR_SPLIT
        split = "tail" if few else "documents"
    parts = source.parts(data.val_fraction if split == "tail" else 0.0)
    asked = tokenizer.model_dump(mode="json")
    given = None
    if isinstance(tokenizer, TokenizerFile):
        given = load_tokenizer(tokenizer.path, tokenizer.end_of_text)
        asked["path"] = fingerprint(given)
    spec = {
        "format": FORMAT,
        "source": source.fingerprint(),
        "split": split,
        "val_fraction": data.val_fraction,
        "repeat": data.repeat,
        "tokenizer": asked,
        "parts": _digest_of(parts),
    }
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]
    slug = re.sub(r"[^\w.-]+", "-", source_label(data.source)).strip("-.") or "text"
    return Plan(data, source, parts, data.dir / f"{slug}-{tokenizer.name}-{digest}", spec, given)


def _digest_of(parts: list[Part]) -> str:
    """What parts a corpus was made in: some of them must not be mixed with others."""
    cuts = [
        (
            part.start,
            part.stop,
            part.held_out,
            [(p.start, p.stop, p.ends, *(p.share or ())) for p in part.pieces],
        )
        for part in parts
    ]
    return hashlib.sha256(json.dumps(cuts).encode()).hexdigest()


def _forced(plan: Plan, crew: Crew) -> Path:
    return crew.home / f"{plan.folder.name}.forced"


def _is_forced(plan: Plan, crew: Crew) -> bool:
    """Whether a task of the same array has removed the old data."""
    try:
        return _forced(plan, crew).read_text(encoding="utf-8") == crew.job
    except OSError:
        return False


def _make_room(plan: Plan, crew: Crew) -> None:
    """Remove the corpus; its manifest first, so that what is left is no corpus."""
    crew.check_free(plan.folder)
    if plan.folder.exists():
        (plan.folder / "manifest.json").unlink(missing_ok=True)
        storage.remove(plan.folder)
    if crew.array:
        storage.write_atomic(_forced(plan, crew), crew.job)


def _manifest(plan: Plan, tokenizer: Tokenizer, rows: list[dict[str, Any]]) -> Manifest:
    shards = {split: [Shard(**row[split]) for row in rows if split in row] for split in SPLITS}
    shards["train"] *= plan.data.repeat
    counts: Counter[str] = sum((Counter(row["bad"]) for row in rows), Counter())
    bad, cleaning = tally(counts, [step.name for step in plan.data.cleaning])
    if isinstance(plan.data.source, Text) and plan.data.source.separator is None:
        # Each file is a document, whose pieces are counted where they are read.
        most = plan.source.documents() or 0
        bad = {reason: min(count, most) for reason, count in bad.items()}
    return Manifest(
        format=FORMAT,
        spec=plan.spec,
        tokenizer=fingerprint(tokenizer),
        dtype="<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4",
        vocab_size=tokenizer.vocab_size,
        bad=bad,
        cleaning=[asdict(step) for step in cleaning],
        shards=shards,
    )
