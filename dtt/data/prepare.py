"""Documents to token shards: in parallel, resumable per part, the same bytes for any number of
workers.

The folder's name holds a hash of everything that the result depends on, so prepared data is found
again, and is never mistaken for data of another text, tokenizer or split.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtt import storage
from dtt.config.data import Bpe, Byte, Char, Data, TokenizerFile
from dtt.config.data import Tokenizer as TokenizerSettings
from dtt.config.schema import Config
from dtt.data.encoding import PartAlphabet, PartEncoder, map_parts, row_path, training_documents
from dtt.data.progress import Advance, progress
from dtt.data.shards import (
    FORMAT,
    SPLITS,
    Manifest,
    Shard,
    TokenStream,
    read_manifest,
)
from dtt.data.sources import Part, SourceReader, open_source
from dtt.errors import EXIT_DONE, DataError
from dtt.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    fingerprint,
    load_tokenizer,
    named_end,
    train_bpe,
)

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

    def stream(self, split: str) -> TokenStream:
        """Return the tokens of "train" or "val"."""
        return TokenStream(self.folder, self.manifest, split, self.tokenizer.end_of_text)


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
    tokenizer = load_tokenizer(folder, named_end(manifest.spec["tokenizer"]))
    if fingerprint(tokenizer) != manifest.tokenizer:
        raise DataError(
            f"{folder}/tokenizer.json is not the tokenizer that made these tokens",
            "run `dtt tokenize --force`",
        )
    return Corpus(folder, manifest, tokenizer)


def prepare(
    data: Data,
    tokenizer: TokenizerSettings,
    *,
    force: bool = False,
    report: Report = lambda line: None,
    advance: Advance = lambda phase, done, total: None,
) -> Corpus:
    """Return the prepared corpus of these settings, making what is missing of it.

    `report` gets warnings as lines. A second process that wants the same corpus waits for the
    first. Killed at any moment and started again, it continues with the parts that are missing.
    """
    plan = _plan(data, tokenizer)
    lock = plan.folder.with_name(f"{plan.folder.name}.lock")
    with storage.exclusive(lock, lambda: report(f"waiting for the process that makes {lock.stem}")):
        if force:
            shutil.rmtree(plan.folder, ignore_errors=True)
        if (plan.folder / "manifest.json").exists():
            corpus = open_corpus(plan.folder)
            for name in SPLITS:
                corpus.stream(name).verify(VERIFIED_TOKENS)
            return corpus
        plan.folder.mkdir(parents=True, exist_ok=True)
        made = _tokenizer(plan, tokenizer, advance)
        rows = _encode(plan, made, advance)
        manifest = _manifest(plan, made, rows)
        _check(manifest, data, report, sum(row["skipped"] for row in rows))
        storage.write_atomic(plan.folder / "manifest.json", manifest.to_json())
        for part in plan.parts:
            row_path(plan.folder, part.index).unlink()
    return Corpus(plan.folder, manifest, made)


def _plan(data: Data, tokenizer: TokenizerSettings) -> Plan:
    source = open_source(data.source)
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
    }
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]
    label = Path(data.source.path[0]).stem if data.source.name == "text" else data.source.name
    slug = re.sub(r"[^\w.-]+", "-", label).strip("-.") or "text"
    return Plan(data, source, parts, data.dir / f"{slug}-{tokenizer.name}-{digest}", spec, given)


def _tokenizer(plan: Plan, settings: TokenizerSettings, advance: Advance) -> Tokenizer:
    """Return the corpus's tokenizer: the file that is there, or a new one, from training text."""
    path = plan.folder / "tokenizer.json"
    if plan.given is None and path.exists():
        return load_tokenizer(path, named_end(plan.spec["tokenizer"]))
    made: Tokenizer
    match settings:
        case Byte():
            made = ByteTokenizer()
        case TokenizerFile():
            assert plan.given is not None
            made = plan.given
        case Char():
            letters = PartAlphabet(plan.source, plan.data.val_fraction)
            found: set[str] = set()
            for done, more in enumerate(map_parts(letters, plan.parts, plan.data.workers), 1):
                advance("reading characters", done, len(plan.parts))
                found |= more
            made = CharTokenizer(found)
        case Bpe():
            texts = _training_texts(plan, settings.train_bytes, advance)
            made = train_bpe(texts, settings.vocab_size, settings.special_tokens)
    storage.write_atomic(path, made.to_json())
    return made


def _training_texts(plan: Plan, limit: int, advance: Advance) -> Iterator[str]:
    """Yield training documents, parts in a seeded order, until `limit` bytes are reached."""
    order, taken = list(plan.parts), 0
    random.Random(0).shuffle(order)
    for part in order:
        for text in training_documents(plan.source, part, plan.data.val_fraction):
            size = len(text.encode("utf-8", "replace"))
            if taken + size > limit:
                yield text[: limit - taken]
                return
            taken += size
            yield text
        advance("training the tokenizer", taken, limit)


def _encode(plan: Plan, tokenizer: Tokenizer, advance: Advance) -> list[dict[str, Any]]:
    """Encode the parts that are missing; return the rows of all."""
    rows = [row_path(plan.folder, part.index) for part in plan.parts]
    missing = [part for part, row in zip(plan.parts, rows, strict=True) if not row.exists()]
    encoder = PartEncoder(plan.source, tokenizer, plan.folder, plan.data.val_fraction)
    done = len(plan.parts) - len(missing)
    for _ in map_parts(encoder, missing, plan.data.workers):
        done += 1
        advance("encoding", done, len(plan.parts))
    return [json.loads(row.read_text(encoding="utf-8")) for row in rows]


def _manifest(plan: Plan, tokenizer: Tokenizer, rows: list[dict[str, Any]]) -> Manifest:
    shards = {split: [Shard(**row[split]) for row in rows if split in row] for split in SPLITS}
    shards["train"] *= plan.data.repeat
    return Manifest(
        format=FORMAT,
        spec=plan.spec,
        tokenizer=fingerprint(tokenizer),
        dtype="<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4",
        vocab_size=tokenizer.vocab_size,
        shards=shards,
    )


def _check(manifest: Manifest, data: Data, report: Report, skipped: int) -> None:
    for split in SPLITS:
        if not manifest.total(split, "tokens"):
            raise DataError(
                f"the {split} split is empty (data.val_fraction {data.val_fraction}, "
                f"data.split {manifest.spec['split']})",
                "give more text, another data.val_fraction, or data.split tail",
            )
        unknown, tokens = manifest.total(split, "unknown"), manifest.total(split, "tokens")
        if unknown:
            report(
                f"{unknown:,} of {tokens:,} characters of the {split} split do not occur in the "
                "training text; they became the token <unknown>"
            )
    if skipped:
        report(f"{skipped:,} documents could not be decoded and were left out")


def prepare_command(config: Config, *, force: bool) -> int:
    """Prepare a configuration's corpus, say what it holds, and return the exit code."""
    begun = time.perf_counter()
    with progress() as advance:
        corpus = prepare(
            config.data,
            config.tokenizer,
            force=force,
            report=lambda line: print(f"dtt tokenize: warning: {line}", file=sys.stderr),
            advance=advance,
        )
    seconds = time.perf_counter() - begun
    manifest = corpus.manifest
    print(f"{corpus.folder}  ({seconds:.1f} s)")
    print(f"tokenizer {config.tokenizer.name}, {manifest.vocab_size} tokens, {manifest.dtype}")
    for split in SPLITS:
        size, tokens = manifest.total(split, "bytes"), manifest.total(split, "tokens")
        ideal = manifest.ideal_bits(split)
        print(
            f"{split:>5}: {manifest.total(split, 'documents'):,} documents, {size:,} bytes, "
            f"{tokens:,} tokens ({size / tokens:.2f} bytes each)"
            + (f", floor {ideal / size:.4f} bits/byte" if ideal else "")
        )
    return EXIT_DONE
