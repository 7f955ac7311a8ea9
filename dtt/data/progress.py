"""How far preparing data is: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

PAUSE = 30.0
"""Seconds between two lines where there is no terminal."""


class Advance(Protocol):
    """Told the phase, how much of how much is done, and what else there is to say of it.

    A total of 0: how much there is to do is not known.
    """

    def __call__(self, phase: str, done: int, total: int, note: str = "", /) -> None: ...


def silent(phase: str, done: int, total: int, note: str = "", /) -> None:
    """Say nothing."""


@contextmanager
def progress(*, speaks: bool = True) -> Iterator[Advance]:
    """Show each phase while inside; nothing unless this process `speaks` for all."""
    if not speaks:
        yield silent
    elif sys.stderr.isatty():
        yield from _bars()
    else:
        yield _lines()


def _bars() -> Iterator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(40), TaskProgressColumn())
    note_column = TextColumn("{task.fields[note]}")
    tasks: dict[str, TaskID] = {}
    with Progress(
        *columns,
        TimeElapsedColumn(),
        TextColumn("elapsed"),
        note_column,
        console=Console(stderr=True),
        transient=True,
    ) as bar:

        def advance(phase: str, done: int, total: int, note: str = "", /) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total or None, note=note)
            bar.update(tasks[phase], total=total or None, completed=done, note=note)

        yield advance


def _lines() -> Advance:
    due = time.monotonic() + PAUSE

    def advance(phase: str, done: int, total: int, note: str = "", /) -> None:
        nonlocal due
        if time.monotonic() >= due and (done < total or not total):
            due = time.monotonic() + PAUSE
            count = f": {done:,} of {total:,}" if total else ""
            said = f", {note}" if note else ""
            print(f"{phase}{count}{said}", file=sys.stderr, flush=True)

    return advance
