"""`dtt data stats`: the figures of a corpus as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dtt.data.inspection.length_picture import draw_lengths
from dtt.data.inspection.location import find_corpora
from dtt.data.inspection.scanning import Scan
from dtt.data.inspection.statistics import (
    SAMPLE,
    SEED,
    Lengths,
    Repeats,
    Usage,
    copies_of,
    count_lengths,
    count_tokens,
    find_repeats,
    histogram,
    sample_lengths,
)
from dtt.data.inspection.token_text import printable, token_texts
from dtt.data.preparation.prepare import Corpus
from dtt.data.shards import SPLITS, DocumentIndex
from dtt.errors import EXIT_DONE
from dtt.tokenizer import Tokenizer

SELDOM = 100
"""A token seen less often than this is hardly trained."""
BAR = 40
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}


@dataclass(frozen=True)
class SplitFigures:
    """What is known of a split."""

    split: str
    documents: int
    bytes: int
    tokens: int
    unknown: int
    copies: int
    lengths: Lengths
    repeats: Repeats
    usage: Usage
    compared: bool
    """Whether all documents were compared, and not those of chosen lengths."""


def measure(corpus: Corpus, most: int) -> dict[str, SplitFigures]:
    """Return the figures of both splits; at most about `most` tokens of a split are read."""
    manifest = corpus.manifest
    indexes = {s: DocumentIndex(corpus.folder, manifest, s) for s in SPLITS}
    lengths = {s: count_lengths(index) for s, index in indexes.items()}
    # The same lengths in both, so that documents of one are found in the other.
    chosen = sample_lengths(_together(list(lengths.values())), most)
    found = {}
    for split, index in indexes.items():
        stream, copies = Scan(corpus, split), copies_of(manifest, split)
        found[split] = SplitFigures(
            split=split,
            documents=len(index),
            bytes=manifest.total(split, "bytes"),
            tokens=manifest.total(split, "tokens"),
            unknown=manifest.total(split, "unknown"),
            copies=copies,
            lengths=lengths[split],
            repeats=find_repeats(stream, index, chosen, copies),
            usage=count_tokens(stream, corpus.tokenizer.vocab_size, most),
            compared=bool(np.isin(lengths[split].values, chosen).all()),
        )
    return found


def _together(parts: list[Lengths]) -> Lengths:
    values = np.unique(np.concatenate([part.values for part in parts]))
    counts = np.zeros(len(values), np.int64)
    for part in parts:
        counts[np.searchsorted(values, part.values)] += part.counts
    return Lengths(values, counts)


def as_dict(corpus: Corpus, figures: dict[str, SplitFigures]) -> dict[str, Any]:
    """Return everything that was measured, for --json."""
    tokenizer, train = corpus.tokenizer, figures["train"]
    splits = {}
    for name, split in figures.items():
        splits[name] = {
            "documents": split.documents,
            "bytes": split.bytes,
            "tokens": split.tokens,
            "bytes_per_token": split.bytes / split.tokens,
            "unknown_share": split.unknown / split.tokens,
            "copies": split.copies,
            "tokens_per_document": {
                "mean": split.tokens / split.documents,
                **{key: split.lengths.quantile(share) for key, share in QUANTILES.items()},
            },
            "histogram": histogram(split.lengths),
            "repeats": {
                "documents": split.repeats.repeats,
                "tokens": split.repeats.tokens,
                "compared": split.repeats.searched,
                "exact": split.compared,
                "most": split.repeats.groups,
            },
        }
    leaked = figures["val"].repeats.found_in(train.repeats)
    counts = train.usage.counts
    return {
        "corpus": str(corpus.folder),
        "vocab_size": tokenizer.vocab_size,
        "splits": splits,
        "left_out": corpus.manifest.bad,
        "cleaning": corpus.manifest.cleaning,
        "val_documents_in_train": leaked,
        "tokens": {
            "read": train.usage.read,
            "exact": train.usage.exact,
            "seed": None if train.usage.exact and train.compared else SEED,
            "entropy_bits": train.usage.entropy,
            "unused": np.flatnonzero(counts == 0).tolist(),
            "seldom": int(((counts > 0) & (counts < SELDOM)).sum()),
            "top": [[int(i), int(counts[i])] for i in np.argsort(-counts, kind="stable")[:20]],
        },
    }


def lines(corpus: Corpus, figures: dict[str, SplitFigures]) -> list[str]:
    """Return everything that was measured, for people."""
    out = [f"{corpus.folder}", f"vocabulary {corpus.tokenizer.vocab_size:,}", ""]
    rows = [("", *figures)]
    for name, show in _ROWS:
        rows.append((name, *(show(split) for split in figures.values())))
    train, val = figures["train"], figures["val"]
    rows.append(("in train too", "", _share(val.repeats.found_in(train.repeats), val)))
    out += [f"{row[0]:<22}" + "".join(f"{cell:>20}" for cell in row[1:]) for row in rows]
    for split in figures.values():
        out += _notes(split)
    out += [f"left out or repaired, {reason}: {n:,}" for reason, n in corpus.manifest.bad.items()]
    for step in corpus.manifest.cleaning:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in step["reasons"].items())
        out.append(
            f"cleaning, {step['name']}: {step['removed']:,} removed"
            f"{f' ({reasons})' if reasons else ''}, {step['changed']:,} changed"
        )
    return [*out, "", *_token_lines(corpus.tokenizer, train.usage), "", *_bars(train.lengths)]


def _share(count: int, split: SplitFigures) -> str:
    return f"{count:,} ({count / max(1, split.repeats.searched):.2%})"


def _quantile(share: float) -> Callable[[SplitFigures], str]:
    return lambda split: f"{split.lengths.quantile(share):,}"


_ROWS: tuple[tuple[str, Callable[[SplitFigures], str]], ...] = (
    ("documents", lambda s: f"{s.documents:,}"),
    ("bytes", lambda s: f"{s.bytes:,}"),
    ("tokens", lambda s: f"{s.tokens:,}"),
    ("bytes per token", lambda s: f"{s.bytes / s.tokens:.3f}"),
    ("unknown tokens", lambda s: f"{s.unknown:,} ({s.unknown / s.tokens:.3%})"),
    ("tokens per document", lambda s: f"{s.tokens / s.documents:,.1f}"),
    *((f"  {key}", _quantile(share)) for key, share in QUANTILES.items()),
    ("exact duplicates", lambda s: _share(s.repeats.repeats, s)),
)


def _notes(split: SplitFigures) -> list[str]:
    found = []
    if split.copies > 1:
        found.append(
            f"{split.split} was written {split.copies} times (data.repeat); duplicates are those "
            "within one"
        )
    if not split.compared:
        found.append(
            f"{split.split}: duplicates are those among {split.repeats.searched:,} documents, all "
            f"of the lengths chosen by seed {SEED}; --max-tokens reads more"
        )
    if split.repeats.groups:
        groups = ", ".join(f"{n:,} x document {first}" for n, first in split.repeats.groups)
        found.append(f"{split.split}, most repeated: {groups}")
    return found


def _token_lines(tokenizer: Tokenizer, usage: Usage) -> list[str]:
    counts = usage.counts
    unused = np.flatnonzero(counts == 0)
    seldom = int(((counts > 0) & (counts < SELDOM)).sum())
    where = "the train split" if usage.exact else f"{usage.read:,} tokens of it, seed {SEED}"
    top = [i for i in np.argsort(-counts, kind="stable")[:12].tolist() if counts[i]]
    found = [
        f"tokens used: {len(counts) - len(unused):,} of {len(counts):,}, {seldom:,} of them less "
        f"than {SELDOM} times; {usage.entropy:.2f} bits each by frequency ({where})",
        "most frequent: "
        + "  ".join(f"{_name(tokenizer, i)} {counts[i] / usage.read:.2%}" for i in top),
    ]
    if len(unused):
        names = "  ".join(_name(tokenizer, i) for i in unused[:12].tolist())
        found.append(f"unused: {names}{' ...' if len(unused) > 12 else ''}")
    return found


def _name(tokenizer: Tokenizer, token: int) -> str:
    """A token for people: its text in quotes, or its number where it has none."""
    if token == tokenizer.end_of_text:
        return "<end of text>"
    text = next(token_texts(tokenizer, [token]))
    return json.dumps(printable(text), ensure_ascii=False) if text else f"#{token}"


def _bars(lengths: Lengths) -> list[str]:
    rows = histogram(lengths)
    most = max((count for _, _, count in rows), default=1)
    head = f"{'tokens a document':>21} {'documents':>12}  (train)"
    bars = ("█" * max(round(BAR * count / most), count > 0) for _, _, count in rows)
    return [head] + [
        f"{f'{low:,} - {high:,}':>21} {count:>12,}  {bar}"
        for (low, high, count), bar in zip(rows, bars, strict=True)
    ]


def stats_command(
    *, name: str, source: str | None, max_tokens: int | None, json_line: bool, output: Path | None
) -> int:
    """Print the figures of the corpora that `name` says; return the exit code."""
    found = find_corpora(name)
    if source is None:
        corpora = [portion.corpus for portion in found.corpora.portions]
    else:
        corpora = [found.corpus(source)]
    for corpus in corpora:
        for split in corpus.manifest.shards:
            corpus.verify(split)
    measured = [(corpus, measure(corpus, max_tokens or SAMPLE)) for corpus in corpora]
    for place, (corpus, figures) in enumerate(measured):
        if json_line:
            print(json.dumps(as_dict(corpus, figures), ensure_ascii=False))
        else:
            print("\n" * (place > 0) + "\n".join(lines(corpus, figures)))
    if output is not None:
        draw_lengths(
            {
                corpus.folder.name: {name: split.lengths for name, split in figures.items()}
                for corpus, figures in measured
            },
            output,
        )
    return EXIT_DONE
