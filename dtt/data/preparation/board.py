"""The parts of a corpus that are still to be made, and how fast they become fewer."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from dtt.data.preparation.crew import Crew
from dtt.data.preparation.encoding import PartEncoder, is_finished, read_row, row_path
from dtt.data.preparation.workers import Workers
from dtt.data.progress import Advance
from dtt.data.sources import Part

RETRY = 0.25
"""Seconds between two looks at parts that others have claimed."""
COUNT = 3.0
"""Seconds between two counts of what all have done."""


class Board:
    """What one process knows of the parts; the truth is the rows in the folder.

    It begins at its own seat's stripe and goes round, taking what nobody else has claimed: so ranks
    do not stand in each other's way, and a fast one does the work of a slow one.
    """

    def __init__(self, folder: Path, parts: Sequence[Part], crew: Crew, itemsize: int) -> None:
        self.folder, self.crew, self.number = folder, crew, len(parts)
        seat, seats = crew.seat
        start = len(parts) * seat // seats
        self._itemsize = itemsize
        rows = self._rows()
        self.done = {index for index in rows if read_row(folder, index, itemsize)}
        self._broken = rows - self.done  # rows whose files are not whole
        turn = [*parts[start:], *parts[:start]]
        self._fresh = deque(part for part in turn if part.index not in self.done)
        self._held: deque[Part] = deque()
        self._next_try = 0.0
        self._finished = False

    @property
    def complete(self) -> bool:
        """Whether all parts are made, by whomever."""
        return self._finished or len(self.done) == self.number

    def take(self) -> Part | None:
        """Claim a part and return it; None if there is none to be had now."""
        while self._fresh:
            part = self._fresh.popleft()
            if self._is_free(part):
                return part
        if not self._held or time.monotonic() < self._next_try:
            return None
        for _ in range(len(self._held)):
            part = self._held.popleft()
            if self._is_free(part):
                return part
        self._next_try = time.monotonic() + RETRY
        return None

    def _is_free(self, part: Part) -> bool:
        if self._is_made(part.index):
            self.done.add(part.index)
            return False
        free = self.crew.claim(f"part-{part.index:05d}")
        if is_finished(self.folder):  # its rows are gone, which says nothing any more
            self._finished = True
            self.crew.forget()
            return False
        if not free:
            self._held.append(part)
        return free

    def _is_made(self, index: int) -> bool:
        if index in self._broken:
            return read_row(self.folder, index, self._itemsize) is not None
        return row_path(self.folder, index).exists()

    def _rows(self) -> set[int]:
        names = (re.fullmatch(r"part-(\d+)\.json", name) for name in os.listdir(self.folder))
        return {int(name[1]) for name in names if name}

    def count(self) -> int:
        """Look how many parts are made."""
        self.done |= self._rows() - self._broken
        return len(self.done)


def make_parts(
    board: Board, encoder: PartEncoder, workers: Workers, crew: Crew, advance: Advance
) -> None:
    """Return when all parts are made, having made those that this process could claim."""
    pace = _Pace(board, advance)
    with workers.start(encoder, board.number - len(board.done)) as pool:
        running: dict[Future[Any], Part] = {}
        while not board.complete:
            while len(running) < pool.slots and (part := board.take()) is not None:
                running[pool.submit(part)] = part
            if running:
                for future in wait(running, RETRY, FIRST_COMPLETED).done:
                    pace.bytes += future.result()
                    pace.parts += 1
                    board.done.add(running.pop(future).index)
            elif not board.complete:
                time.sleep(0.05)
            crew.look()
            pace.show()


class _Pace:
    """Parts, speed and time left of all processes together, as this one sees them."""

    def __init__(self, board: Board, advance: Advance) -> None:
        self.board, self.advance = board, advance
        self.begun, self.before = time.monotonic(), len(board.done)
        self.parts = self.bytes = 0
        self._next = 0.0

    def show(self) -> None:
        now, board = time.monotonic(), self.board
        if now < self._next and not board.complete:
            return
        # Counting is reading a folder: alone there is no need to.
        made = len(board.done) if board.crew.alone or board.complete else board.count()
        self._next = now + (0.1 if board.crew.alone else COUNT)
        seconds, news, note = now - self.begun, made - self.before, ""
        if news and self.parts and seconds > 1:
            # The others' parts are as large as one's own.
            speed = news * self.bytes / self.parts / seconds / 1e6
            note = f"{speed:.1f} MB/s, {duration((board.number - made) * seconds / news)} left"
        self.advance("encoding", made, board.number, note)


def duration(seconds: float) -> str:
    """Return a time span as people say it: 40 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
