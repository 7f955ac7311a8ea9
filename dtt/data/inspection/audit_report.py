"""`dtt data audit`: what a run's steps saw, proved and shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtt import storage
from dtt.data.corpora import Corpora
from dtt.data.inspection.audit import Audit, audit, ledger_lines, samples_of
from dtt.data.inspection.location import Found, find_corpora
from dtt.data.inspection.look import Look
from dtt.data.inspection.token_text import printable
from dtt.data.loader import Loader
from dtt.errors import EXIT_DONE, ConfigError, DataError

SHOWN = 20
"""Faults that are listed."""
PREVIEW = 60


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics.jsonl; a torn last line is left out, others are a DataError."""
    with storage.storage_errors(path, "read"), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if not isinstance(row["step"], int) or row["step"] < 1:
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                if not line.endswith(b"\n"):
                    return
                raise DataError(f"{path}:{number} is not a line of metrics", "restore it") from None
            yield row


def audit_command(*, name: str, step: int | None, json_line: bool, output: Path | None) -> int:
    """Prove what a run's steps saw; DataError if some step saw something else."""
    found = find_corpora(name)
    if found.run is None or found.config is None:
        raise ConfigError(f"{name} is a corpus, not a run", "name the folder of a run")
    settings = found.config
    loader = found.corpora.loader(
        settings.model.context, settings.training.batch_size, settings.seed, 0, 1, pin=False
    )
    if step is not None:
        _refuse_step(found.run, step)
    for portion in found.corpora.portions:
        portion.corpus.verify("train")
    if step is not None:
        _show_step(found, loader, step)
        return EXIT_DONE
    result = audit(loader, read_rows(found.run / "metrics.jsonl"))
    if not result.steps:
        raise _untrained(found.run)
    if json_line:
        print(json.dumps(_as_dict(found.run, result)))
    else:
        print("\n".join(_lines(found.run, found.corpora, result, loader)))
    if output is not None:
        lines = ledger_lines(loader, range(1, result.last + 1))
        storage.write_stream_atomic(output, ((json.dumps(row) + "\n").encode() for row in lines))
    if result.faults:
        more = f" (and {len(result.faults) - 1:,} more)" if len(result.faults) > 1 else ""
        raise DataError(
            f"{found.run}: {result.faults[0]}{more}",
            "its data changed while it trained, or this is a fault of dtt: please report it",
        )
    return EXIT_DONE


def _refuse_step(run: Path, step: int) -> None:
    """Raise ConfigError if a step never ran: what it would see nobody saw."""
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    if not steps:
        raise _untrained(run)
    first, last = min(steps), max(steps)
    if not first <= step <= last:
        raise ConfigError(
            f"--step {step}: {run} has steps {first:,} to {last:,}",
            f"give a number from {first} to {last}",
        )


def _untrained(run: Path) -> DataError:
    return DataError(f"{run / 'metrics.jsonl'} has no step yet", "train the run first")


def _as_dict(run: Path, result: Audit) -> dict[str, Any]:
    return {
        "run": str(run),
        "first_step": result.first,
        "last_step": result.last,
        "samples": result.samples,
        "recorded": result.recorded,
        "epochs": [
            dict(zip(("windows", "whole", "seen_of_next"), (e.windows, *e.progress), strict=True))
            for e in result.epochs
        ],
        "faults": result.faults,
    }


def _lines(run: Path, corpora: Corpora, result: Audit, loader: Loader) -> Iterator[str]:
    yield f"{run}: steps {result.first:,} to {result.last:,}, {result.samples:,} samples"
    for portion, epochs in zip(corpora.portions, result.epochs, strict=True):
        whole, begun = epochs.progress
        yield (
            f"{portion.name or portion.corpus.folder}: {epochs.windows:,} windows of "
            f"{loader.context} tokens; whole epochs: {whole:,}; of the next: {begun:,} windows "
            f"({begun / epochs.windows:.1%})"
        )
    if result.recorded:
        agree = result.recorded - len(result.differing)
        yield (
            f"recorded while training: {result.recorded:,} of {result.steps:,} steps, {agree:,} as "
            "the order has them"
        )
    else:
        yield "recorded while training: nothing"
    yield from result.faults[:SHOWN]
    if not result.faults:
        who = "the run saw" if result.recorded == result.steps else "by the order the run saw"
        yield f"{who} no window twice in an epoch, and every window in each whole one"


def _show_step(found: Found, loader: Loader, step: int) -> None:
    """Print the samples of one step, with the beginnings of their texts."""
    samples = samples_of(loader, step - 1)
    looks = [Look(portion.corpus, "train") for portion in found.corpora.portions]
    print(f"{'sample':>8} {'epoch':>6} {'window':>10} {'from token':>12} {'document':>9}")
    for place, (source, epoch, window, start) in enumerate(
        zip(
            samples.sources.tolist(),
            samples.epochs.tolist(),
            samples.windows.tolist(),
            samples.starts.tolist(),
            strict=True,
        )
    ):
        look, name = looks[source], found.corpora.portions[source].name
        text = look.tokenizer.decode(look.stream.read(start, PREVIEW).tolist())
        shown = printable(" ".join(text.split()))[:PREVIEW]
        print(
            f"{place:>8} {epoch:>6} {window:>10} {start:>12} {look.index.at(start + 1):>9}  "
            f"{f'{name}: ' if name else ''}{shown}"
        )
