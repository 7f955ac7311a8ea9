"""Documents to token shards: in parallel, resumable per part, the same bytes for any number of
workers.

The folder's name holds a hash of everything that the result depends on, so prepared data is found
again, and is never mistaken for data of another text, tokenizer or split.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dtt import storage
from dtt.config.data import Bpe, Byte, Char, Data, TokenizerFile
from dtt.config.data import Tokenizer as TokenizerSettings
from dtt.config.schema import Config
from dtt.data.progress import Advance, progress
from dtt.data.shards import (
    FORMAT,
    SPLITS,
    Manifest,
    Shard,
    TokenStream,
    read_manifest,
    write_shard,
)
from dtt.data.sources import Document, Part, SourceReader, open_source
from dtt.errors import EXIT_DONE, DataError
from dtt.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    fingerprint,
    load_tokenizer,
    parse_tokenizer,
    train_bpe,
)

DOCUMENTS_FOR_SPLIT = 20
"""With fewer documents than this a split by document says little; `auto` takes the tail."""

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
    """All that a worker needs to know; a pure function of the settings and the text."""

    data: Data
    parts: tuple[Part, ...]
    folder: Path
    spec: dict[str, Any]


def open_corpus(folder: Path) -> Corpus:
    """Open a prepared folder; DataError if it is incomplete or its tokenizer is another one."""
    manifest, tokenizer = read_manifest(folder), load_tokenizer(folder)
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
    with storage.exclusive(plan.folder.with_suffix(".lock")):
        if force:
            shutil.rmtree(plan.folder, ignore_errors=True)
        if (plan.folder / "manifest.json").exists():
            return open_corpus(plan.folder)
        plan.folder.mkdir(parents=True, exist_ok=True)
        made = _tokenizer(plan, tokenizer, advance)
        rows = list(_encode_all(plan, made, advance))
        manifest = _manifest(plan, made, rows)
        _check(manifest, data, report, sum(row["skipped"] for row in rows))
        storage.write_atomic(plan.folder / "manifest.json", manifest.to_json())
        for index in range(len(plan.parts)):
            _row_path(plan.folder, index).unlink()
    return Corpus(plan.folder, manifest, made)


def _plan(data: Data, tokenizer: TokenizerSettings) -> Plan:
    source = open_source(data.source)
    count, split = source.documents(), data.split
    if split == "auto":
        few = count is not None and count < DOCUMENTS_FOR_SPLIT
        split = "tail" if few else "documents"
    parts = source.parts(data.val_fraction if split == "tail" else 0.0)
    asked = tokenizer.model_dump(mode="json")
    if isinstance(tokenizer, TokenizerFile):
        asked["path"] = fingerprint(load_tokenizer(tokenizer.path, tokenizer.end_of_text))
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
    return Plan(data, tuple(parts), data.dir / f"{slug}-{tokenizer.name}-{digest}", spec)


def held_out(document: Document, part: Part, fraction: float) -> bool:
    """Whether a document belongs to validation: by its part, else by a hash of its text, so that
    equal documents are always on the same side."""
    if part.held_out is not None:
        return part.held_out
    digest = hashlib.blake2b(document.text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


# --- tokenizer -----------------------------------------------------------------------------------


def _tokenizer(plan: Plan, settings: TokenizerSettings, advance: Advance) -> Tokenizer:
    """Return the corpus's tokenizer: the file that is there, or a new one, from training text."""
    path = plan.folder / "tokenizer.json"
    if path.exists():
        return load_tokenizer(path)
    made: Tokenizer
    match settings:
        case Byte():
            made = ByteTokenizer()
        case TokenizerFile():
            made = load_tokenizer(settings.path, settings.end_of_text)
        case Char():
            tasks = [(plan, index) for index in range(len(plan.parts))]
            found: set[str] = set()
            for done, letters in enumerate(_map(_alphabet, tasks, plan.data.workers), 1):
                advance("reading characters", done, len(tasks))
                found |= letters
            made = CharTokenizer(found)
        case Bpe():
            texts = _training_texts(plan, settings.train_bytes, advance)
            made = train_bpe(texts, settings.vocab_size, settings.special_tokens)
    storage.write_atomic(path, made.to_json())
    return made


def _training_documents(plan: Plan, source: SourceReader, index: int) -> Iterator[str]:
    part = plan.parts[index]
    for document in source.read(part):
        if not held_out(document, part, plan.data.val_fraction):
            yield document.text


def _alphabet(task: tuple[Plan, int]) -> set[str]:
    plan, index = task
    found: set[str] = set()
    for text in _training_documents(plan, _worker_source(plan), index):
        found.update(text)
    return found


def _training_texts(plan: Plan, limit: int, advance: Advance) -> Iterator[str]:
    """Yield training documents, parts in a seeded order, until `limit` bytes are reached."""
    source, order, taken = open_source(plan.data.source), list(range(len(plan.parts))), 0
    random.Random(0).shuffle(order)
    for index in order:
        for text in _training_documents(plan, source, index):
            size = len(text.encode("utf-8", "replace"))
            if taken + size > limit:
                yield text[: limit - taken]
                return
            taken += size
            yield text
        advance("training the tokenizer", taken, limit)


# --- encoding ------------------------------------------------------------------------------------


def _row_path(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.json"


def _encode_all(plan: Plan, tokenizer: Tokenizer, advance: Advance) -> Iterator[dict[str, Any]]:
    missing = [i for i in range(len(plan.parts)) if not _row_path(plan.folder, i).exists()]
    text = tokenizer.to_json()
    tasks = [(plan, text, index) for index in missing]
    done = len(plan.parts) - len(missing)
    for _ in _map(_encode_part, tasks, plan.data.workers):
        done += 1
        advance("encoding", done, len(plan.parts))
    for index in range(len(plan.parts)):
        yield json.loads(_row_path(plan.folder, index).read_text(encoding="utf-8"))


def _encode_part(task: tuple[Plan, str, int]) -> None:
    """Encode one part to a shard per split; its row is written last, and says that it is done."""
    plan, text, index = task
    tokenizer, source, part = _worker_tokenizer(text), _worker_source(plan), plan.parts[index]
    skipped = source.skipped
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    writers = {split: _ShardWriter(tokenizer) for split in SPLITS}
    for document in source.read(part):
        name = "val" if held_out(document, part, plan.data.val_fraction) else "train"
        writers[name].add(document)
    row: dict[str, Any] = {"skipped": source.skipped - skipped}
    for split, writer in writers.items():
        if writer.tokens:
            shard = writer.write(plan.folder, f"{split}-{index:05d}", dtype)
            row[split] = asdict(shard)
    storage.write_atomic(_row_path(plan.folder, index), json.dumps(row))


class _ShardWriter:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[Any] = []
        self.ends: list[int] = []
        self.length = self.bytes = self.unknown = 0
        self.bits: float | None = 0.0

    def add(self, document: Document) -> None:
        ids = self.tokenizer.encode(document.text)
        if self.tokenizer.unknown is not None:
            self.unknown += int((ids == self.tokenizer.unknown).sum())
        self.tokens.append(ids)
        self.length += len(ids)
        self.bytes += len(document.text.encode("utf-8", "replace"))
        known = self.bits is not None and document.bits is not None
        self.bits = self.bits + document.bits if known else None  # type: ignore[operator]
        if document.ends:
            self.tokens.append(np.array([self.tokenizer.end_of_text], np.uint32))
            self.length += 1
            self.ends.append(self.length)

    def write(self, folder: Path, name: str, dtype: np.dtype[Any]) -> Shard:
        return write_shard(
            folder,
            name,
            np.concatenate(self.tokens).astype(dtype),
            np.array(self.ends, np.uint64),
            bytes=self.bytes,
            unknown=self.unknown,
            bits=self.bits,
        )


_source: tuple[Path, SourceReader] | None = None


def _worker_source(plan: Plan) -> SourceReader:
    """Open the source once in each worker: finding its files once for each part is quadratic."""
    global _source
    if _source is None or _source[0] != plan.folder:
        _source = plan.folder, open_source(plan.data.source)
    return _source[1]


_cached: tuple[str, Tokenizer] | None = None


def _worker_tokenizer(text: str) -> Tokenizer:
    """Build the tokenizer once in each worker, not once for each part."""
    global _cached
    if _cached is None or _cached[0] != text:
        _cached = (text, parse_tokenizer(text, "tokenizer.json"))
    return _cached[1]


def _map(function: Callable[[Any], Any], tasks: list[Any], workers: int) -> Iterator[Any]:
    """Apply `function` to each task, in order, on all cores (or `workers` processes)."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    # Forked workers start in milliseconds; elsewhere than on Linux forking is not safe.
    method = "fork" if sys.platform == "linux" else "spawn"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with ProcessPoolExecutor(workers, multiprocessing.get_context(method)) as pool:
        try:
            yield from pool.map(function, tasks)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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
