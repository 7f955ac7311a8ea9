"""Where figures go: the console, metrics.jsonl and logs/train.log."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from dtt import storage
from dtt.metrics.meter import short_count, short_duration, shown_parts

HEAD_EVERY = 25
"""Rows of the table on a terminal between its heads."""
SHORT = {
    "data": "data",
    "exchange": "ranks",
    "saving": "save",
    "evaluating": "eval",
    "sampling": "sample",
    "logging": "log",
}
"""Parts of the time that a line names, so that a row of the table has room on 80 columns."""
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def perplexity(loss: float) -> float:
    """Return exp(loss), infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


class MetricsFile:
    """metrics.jsonl: one line per optimizer step, and others beside it: for each validation, for
    each line on the console (speed and time), for norms of layers.

    Lines after the step that a run resumes from are dropped, so a step has one line whatever
    happened. Numbers keep all their digits.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        trim_lines(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, **figures: Any) -> None:
        self._file.write(json.dumps(figures) + "\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def trim_lines(path: Path, step: int) -> None:
    """Keep of a .jsonl the lines up to `step`, whole ones; make it if it is not there."""
    storage.write_atomic(path, b"".join(_lines_up_to(path, step)))


def _lines_up_to(path: Path, step: int) -> Iterator[bytes]:
    if not path.exists() or step == 0:
        return
    with path.open("rb") as file:
        for line in file:
            try:
                if json.loads(line)["step"] > step:
                    return
            except (ValueError, KeyError, TypeError):  # a torn last line
                return
            yield line if line.endswith(b"\n") else line + b"\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; a torn last line is left out."""
    rows = []
    with path.open("rb") as file:
        for line in file:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def metrics_table(path: Path) -> dict[str, list[Any]]:
    """Return a metrics.jsonl as columns of equal length, with one row for each step.

    What was not measured after a step is None there. `pandas.DataFrame` takes it as it is.
    """
    rows: dict[int, dict[str, Any]] = {}
    for row in read_metrics(path):
        rows.setdefault(row["step"], {}).update(row)
    names = dict.fromkeys(name for row in rows.values() for name in row)
    return {name: [row.get(name) for row in rows.values()] for name in names}


class Reporter:
    """Speaks to the person: lines on the console, the same in logs/train.log, a bar on a terminal.

    Ranks other than the main one get a reporter without console and file, which says nothing.
    """

    def __init__(self, folder: Path | None, level: str) -> None:
        self._log = logging.getLogger("dtt.training")
        self._log.handlers.clear()
        self._log.propagate = False
        self._log.setLevel(LEVELS[level])
        self._console: Console | None = None
        self._progress: Progress | None = None
        self._steps = self._rows = 0
        if folder is None:
            self._log.addHandler(logging.NullHandler())
            return
        self._console = Console(highlight=False, soft_wrap=True)
        if self._console.is_jupyter:  # plain lines: it has no bar that is written over itself
            self._console = Console(
                highlight=False, soft_wrap=True, force_jupyter=False, force_terminal=False
            )
        storage.make_folder(folder / "logs")
        file = logging.FileHandler(folder / "logs" / "train.log", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._log.addHandler(file)

    def total(self, steps: int) -> None:
        """Say how long the run is."""
        self._steps = steps

    @contextmanager
    def bar(self, step: int) -> Iterator[None]:
        """Show a live line below the others, on a terminal only: how far it is, and the loss."""
        if self._console is None or not self._console.is_terminal:
            yield
            return
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns, console=self._console, transient=True, refresh_per_second=4
        ) as self._progress:
            self._progress.add_task("train", total=self._steps, completed=step, loss="")
            yield
        self._progress = None

    def advance(self, step: int, loss: float | None = None) -> None:
        """Move the live line on to `step`."""
        if self._progress is not None:
            text = "" if loss is None else f"loss {loss:.3f}"
            self._progress.update(self._progress.task_ids[0], completed=step, loss=text)

    def info(self, text: str, style: str | None = None) -> None:
        """Say a line (or several)."""
        self._log.info(text)
        if self._console is not None and self._log.isEnabledFor(logging.INFO):
            self._console.print(text, style=style, markup=False)

    def warning(self, text: str) -> None:
        """Say a line that the person should not miss, on stderr."""
        self._log.warning(text)
        if self._console is not None and self._log.isEnabledFor(logging.WARNING):
            print(f"dtt: warning: {text}", file=sys.stderr, flush=True)

    def trace(self, text: str) -> None:
        """Write a traceback, to the log file only."""
        self._log.error(text)

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Say the line of an optimizer step: on a terminal as a row of a table."""
        line = _line(step, self._steps, figures)
        if self._console is None or not self._console.is_terminal:
            self.info(line)
            return
        self._log.info(line)
        if self._log.isEnabledFor(logging.INFO):
            row = _row(step, self._steps, figures)
            if self._rows % HEAD_EVERY == 0:
                self._console.print(Text(_row(step, self._steps, None), "bold"))
            self._console.print(row, markup=False)
            self._rows += 1

    def close(self) -> None:
        for handler in self._log.handlers:
            handler.close()
        self._log.handlers.clear()


def _line(step: int, steps: int, figures: Mapping[str, float]) -> str:
    parts = [
        f"step {step:>{len(str(steps))}}/{steps}",
        f"loss {figures['loss']:.4f}",
        f"ppl {perplexity(figures['loss']):.4g}",
        f"lr {figures['lr']:.2e}",
        f"grad {figures['grad_norm']:.2f}",
        f"{short_count(figures['tokens_per_second'])} tok/s",
        *([f"MFU {_percent(figures['mfu'])}"] if "mfu" in figures else []),
        f"{short_duration(figures['seconds_left'])} left",
    ]
    return "  ".join([*parts, *_notes(figures)])


def _row(step: int, steps: int, figures: Mapping[str, float] | None) -> str:
    """A row of the table of steps; without figures its head."""
    if figures is None:
        cells = ["step", "loss", "ppl", "lr", "grad", "tok/s", "MFU", "left"]
    else:
        cells = [
            f"{step}/{steps}",
            f"{figures['loss']:.4f}",
            f"{perplexity(figures['loss']):.4g}",
            f"{figures['lr']:.2e}",
            f"{figures['grad_norm']:.2f}",
            short_count(figures["tokens_per_second"]),
            _percent(figures["mfu"]) if "mfu" in figures else "-",
            short_duration(figures["seconds_left"]),
        ]
    widths = (2 * len(str(steps)) + 1, 7, 9, 8, 5, 5, 4, 5)
    row = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join([row, *_notes(figures or {})])


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"


def _notes(figures: Mapping[str, float]) -> list[str]:
    """What took much of an interval and is no training, as in "(data 12%)"."""
    shares = [f"{SHORT[name]} {share:.0%}" for name, share in shown_parts(figures)]
    return [f"({', '.join(shares)})"] if shares else []
