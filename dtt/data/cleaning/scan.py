"""The pass over a corpus that finds its duplicates, shared by all processes that prepare it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from dtt.config.cleaning import Step
from dtt.data.cleaning.reader import CleanedReader
from dtt.data.documents import Part, SourceReader
from dtt.data.preparation.crew import Crew
from dtt.data.preparation.workers import Workers
from dtt.data.progress import Advance

RETRY, PAUSE = 0.25, 0.05
"""Seconds between two looks at the other ranks; and at the parts, while others have all of them."""


def cleaned(source: SourceReader, steps: Sequence[Step], home: Path) -> SourceReader:
    """Return the source with its documents cleaned; itself, if there are no steps."""
    return CleanedReader(source, steps, home) if steps else source


def find_duplicates(
    source: SourceReader, parts: Sequence[Part], crew: Crew, workers: Workers, advance: Advance
) -> None:
    """Return when the documents of `source` can be read: all that has to be decided, is.

    Killed at any moment, it goes on with the parts that are missing. The decision does not depend
    on the number of processes.
    """
    if not isinstance(source, CleanedReader) or source.decided():
        if isinstance(source, CleanedReader):
            source.sweep()
        return
    claim = f"clean-{source.folder.name}"
    _sign(
        source, parts, lambda part: crew.claim(f"{claim}-{part.index:05d}"), crew, workers, advance
    )
    crew.once(claim, source.decided, lambda: source.decide(len(parts)))


def _sign(
    source: CleanedReader,
    parts: Sequence[Part],
    claim: Callable[[Part], bool],
    crew: Crew,
    workers: Workers,
    advance: Advance,
) -> None:
    """Return when all parts have their signatures, having made those that could be claimed."""
    waiting = deque(part for part in parts if not source.signed(part))
    with workers.start(source.sign, len(waiting)) as pool:
        running: set[Future[Any]] = set()
        while (waiting or running) and not source.decided():
            for _ in range(len(waiting)):
                if len(running) >= pool.slots:
                    break
                part = waiting.popleft()
                if source.signed(part):
                    continue
                if claim(part):
                    running.add(pool.submit(part))
                else:
                    waiting.append(part)
            if running:
                done, running = wait(running, RETRY, FIRST_COMPLETED)
                for future in done:
                    future.result()
            elif waiting:
                time.sleep(PAUSE)
            crew.look()
            left = len(waiting) + len(running)
            advance("looking for duplicates", len(parts) - left, len(parts))
