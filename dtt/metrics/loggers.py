"""Where figures go: the console, metrics.jsonl and logs/train.log."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dtt import storage
from dtt.metrics.meter import short_count, short_duration

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def perplexity(loss: float) -> float:
    """Return exp(loss), infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


class MetricsFile:
    """metrics.jsonl: one line per optimizer step, and one per validation.

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
        self._steps = 0
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
        """Show a progress bar below the lines, on a terminal only."""
        if self._console is None or not self._console.is_terminal:
            yield
            return
        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(40))
        with Progress(
            *columns, TimeRemainingColumn(), console=self._console, transient=True
        ) as self._progress:
            self._progress.add_task("train", total=self._steps, completed=step)
            yield
        self._progress = None

    def advance(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

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

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Say the line of an optimizer step."""
        width = len(str(self._steps))
        parts = [
            f"step {step:>{width}}/{self._steps}",
            f"loss {figures['loss']:.4f}",
            f"ppl {perplexity(figures['loss']):.4g}",
            f"lr {figures['lr']:.2e}",
            f"grad {figures['grad_norm']:.2f}",
            f"{short_count(figures['tokens_per_second'])} tok/s",
            f"{short_duration(figures['seconds_left'])} left",
        ]
        self.info("  ".join(parts))

    def close(self) -> None:
        for handler in self._log.handlers:
            handler.close()
        self._log.handlers.clear()
