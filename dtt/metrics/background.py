"""A tracker in a thread of its own: whatever it does, the run goes on, and as fast."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dtt.metrics.trackers import Figures, Tracker

CAPACITY = 1000
"""Things that wait for a slow tracker; more are dropped, and counted."""
PATIENCE = 15.0
"""Seconds that a tracker has at the end for what it still has to send."""

_Call = Callable[[Tracker], None]


class Background:
    """A Tracker that hands everything to another one, which is made and called in a thread.

    Nothing here blocks but `close`, for `patience` seconds at most, and nothing raises. What the
    person should know of it is said with `warn`, always on the caller's thread, each once.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[Callable[[str], None]], Tracker],
        warn: Callable[[str], None],
        *,
        capacity: int = CAPACITY,
        patience: float = PATIENCE,
    ) -> None:
        self._name, self._make, self._warn, self._patience = name, make, warn, patience
        self._calls: queue.Queue[_Call | None] = queue.Queue(capacity)
        self._notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._failed = False
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

    def close(self) -> None:
        """Give the tracker its time to finish, and say what was lost."""
        end = time.monotonic() + self._patience
        with suppress(queue.Full):
            self._calls.put(None, timeout=self._patience)
        self._thread.join(max(end - time.monotonic(), 0.0))
        self._say_notes()
        if self._thread.is_alive():
            self.dropped += self._calls.qsize()
            self._warn(
                f"{self._name} did not finish in {self._patience:.0f} s: some figures may be "
                "missing there; metrics.jsonl has them all"
            )
        elif self.dropped and not self._failed:
            self._warn(f"{self._name} was too slow for {self.dropped} figures, which it lacks")

    def _put(self, call: _Call) -> None:
        self._say_notes()
        if self._failed:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                self._warn(
                    f"{self._name} is slower than the run: what it has no time for is left out "
                    "there; metrics.jsonl has it all"
                )

    def _say_notes(self) -> None:
        while not self._notes.empty():
            self._warn(self._notes.get())

    def _work(self) -> None:
        try:
            tracker = self._make(self._notes.put)
            while (call := self._calls.get()) is not None:
                call(tracker)
            tracker.close()
        except BaseException as error:  # also what a client thinks should end the process
            self._failed = True
            self._notes.put(f"{self._name} failed and is left alone from here on: {_brief(error)}")


def _brief(error: BaseException) -> str:
    text: Any = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
