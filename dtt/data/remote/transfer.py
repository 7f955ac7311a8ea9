"""Several files at a time from the network, with a bar that says how fast and how long still."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dtt import storage
from dtt.data.remote.fetch import Fetcher
from dtt.data.remote.partial import RemoteFile
from dtt.data.remote.retries import StoppedError, note

EVERY = 30.0
"""Seconds between two lines where there is no terminal for a bar."""
WINDOW = 15.0
"""Seconds over which the speed is measured."""

Advance = Callable[[int], None]


def bring(
    files: Sequence[RemoteFile],
    fetcher: Fetcher,
    lock: Path,
    *,
    connections: int = 4,
    what: str = "",
) -> None:
    """Download the files that are not here. One process does it, others wait for it at `lock`.

    The first failure ends all downloads and is raised; what has arrived stays.
    """
    if all(file.record() for file in files):
        return
    with storage.exclusive(lock, lambda: note(f"waiting for another download of {what}")):
        missing = [file for file in files if file.record() is None]
        if not missing:
            return
        known = [file.said if file.size is None else file.size for file in missing]
        total = None if None in known else sum(size or 0 for size in known)
        with _progress(what, total) as advance:
            _in_threads(missing, fetcher, connections, advance)


def _in_threads(
    files: Sequence[RemoteFile], fetcher: Fetcher, connections: int, advance: Advance
) -> None:
    waiting: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
    results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    for file in files:
        waiting.put(file)

    def work() -> None:
        while not fetcher.stop.is_set():
            try:
                fetcher.fetch(waiting.get_nowait(), advance)
            except queue.Empty:
                return
            except BaseException as error:
                results.put(error)
                return
            results.put(None)

    # Daemons: a connection that hangs must not keep a process that has been told to end.
    for _ in range(min(connections, len(files))):
        threading.Thread(target=work, name="download", daemon=True).start()
    try:
        for _ in files:
            error = results.get()
            if error is not None and not isinstance(error, StoppedError):
                raise error
    except BaseException:
        fetcher.stop.set()
        raise


def size_text(count: float) -> str:
    """Bytes for people: 1.2 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def time_text(seconds: float) -> str:
    """A time for people: 0.4 s, 40 s, 5 min, 2 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


class Meter:
    """How much has come, how fast, and how long the rest will take."""

    def __init__(self, total: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.clock = total, clock
        self.done = 0
        self._recent = deque([(clock(), 0)])

    def add(self, count: int) -> None:
        self.done += count
        now = self.clock()
        if now - self._recent[-1][0] >= 0.2:
            self._recent.append((now, self.done))
        while len(self._recent) > 2 and now - self._recent[0][0] > WINDOW:
            self._recent.popleft()

    def speed(self) -> float:
        """Bytes per second over the last WINDOW."""
        then, before = self._recent[0]
        return max(0.0, (self.done - before) / max(self.clock() - then, 1e-3))

    def line(self) -> str:
        speed = self.speed()
        text = size_text(self.done)
        if self.total:
            text += f" of {size_text(self.total)} ({100 * self.done // self.total}%)"
        text += f", {size_text(speed)}/s"
        if self.total and speed > 0:
            text += f", {time_text((self.total - self.done) / speed)} left"
        return text


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Advance]:
    """Show a bar on a terminal, else a line now and then."""
    meter, lock = Meter(total), threading.Lock()
    terminal = sys.stderr.isatty()
    every = 0.2 if terminal else EVERY
    shown = meter.clock()

    def advance(count: int) -> None:
        nonlocal shown
        with lock:
            meter.add(count)
            if meter.clock() - shown < every:
                return
            shown = meter.clock()
            text = f"{what}: {meter.line()}"
            if terminal:
                print(f"\r\033[K{text[:120]}", end="", file=sys.stderr, flush=True)
            else:
                note(text)

    try:
        yield advance
    finally:
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
