"""A tracker in a thread of its own: whatever it does, the run goes on, and as fast."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dtt.metrics.trackers import PATIENCE, Figures, Say, Tracker

CAPACITY = 1000
"""Things that wait for a slow tracker; more are dropped, and counted."""
HASTE = 3.0
"""Seconds that trackers have at the end, all together, where an error ends the run: the other ranks
hear of it only afterwards, and end one that takes longer than dtt.rendezvous.alarm.GRACE."""

_Call = Callable[[Tracker], None]


class Background:
    """A Tracker that hands everything to another one, which is made and called in a thread.

    Nothing here blocks but the end (`close_all`), and nothing raises. What the person should know
    of it is said with `info` or `warn`, always on the caller's thread, each once.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[Say, Say], Tracker],
        *,
        info: Say,
        warn: Say,
        capacity: int = CAPACITY,
    ) -> None:
        """`make` is given what says a line of news, and what says a warning."""
        self._name, self._make, self._info, self._warn = name, make, info, warn
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._capacity = capacity
        self._notes: queue.SimpleQueue[tuple[Say, str]] = queue.SimpleQueue()
        self._failed = False
        self._finishing = 0.0
        self.dropped = 0
        """Things that a tracker too slow or broken never got."""
        # A daemon: one that never comes back must not keep the process.
        self._thread = threading.Thread(target=self._work, name=f"dtt-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, figures: Figures) -> None:
        kept = dict(figures)
        self._put(lambda tracker: tracker.log(step, kept))

    def text(self, step: int, name: str, text: str) -> None:
        self._put(lambda tracker: tracker.text(step, name, text))

    def picture(self, step: int, name: str, path: Path) -> None:
        self._put(lambda tracker: tracker.picture(step, name, path))

    def finish(self) -> None:
        """Have the tracker closed once it has taken what waits for it."""
        self._finishing = time.monotonic()
        self._calls.put(None)

    def wait(self, until: float) -> None:
        """Wait for the tracker to be closed, until then by time.monotonic; say what was lost."""
        self._thread.join(max(until - time.monotonic(), 0.0))
        self._say_notes()
        if self._thread.is_alive():
            self.dropped += max(self._calls.qsize() - 1, 0)  # the last is no figure
            self._warn(
                f"{self._name} did not finish in {time.monotonic() - self._finishing:.0f} s: some "
                "figures may be missing there; metrics.jsonl has them all"
            )
        elif self.dropped and not self._failed:
            self._warn(f"{self._name} was too slow for {self.dropped} figures, which it lacks")

    def _put(self, call: _Call) -> None:
        self._say_notes()
        if self._failed:
            return
        if self._calls.qsize() < self._capacity:
            self._calls.put(call)
            return
        self.dropped += 1
        if self.dropped == 1:
            self._warn(
                f"{self._name} is slower than the run: what it has no time for is left out "
                "there; metrics.jsonl has it all"
            )

    def _say_notes(self) -> None:
        while not self._notes.empty():
            say, text = self._notes.get()
            say(text)

    def _work(self) -> None:
        try:
            tracker = self._make(
                lambda text: self._notes.put((self._info, text)),
                lambda text: self._notes.put((self._warn, text)),
            )
            while (call := self._calls.get()) is not None:
                call(tracker)
            tracker.close()
        except BaseException as error:  # also what a client thinks should end the process
            self._failed = True
            text = f"{self._name} failed and is left alone from here on: {_brief(error)}"
            self._notes.put((self._warn, text))


def close_all(trackers: Sequence[Background], seconds: float = PATIENCE) -> None:
    """Close trackers, all at the same time, and wait so many seconds for them together."""
    until = time.monotonic() + seconds
    for tracker in trackers:
        tracker.finish()
    for tracker in trackers:
        tracker.wait(until)


def _brief(error: BaseException) -> str:
    text: Any = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
