"""Trying again: what a network may do twice, how long to wait, and when to give up."""

from __future__ import annotations

import email.utils
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from dtt.errors import DataError

TRIES = 5
"""Failures in a row, without a byte in between, after which a download ends with an error."""
LONGEST_BACKOFF = 30.0
"""Seconds between two tries, unless the server asks for more."""
LONGEST_WAIT = 600.0
"""Seconds that a server may ask for; a longer time is the user's to wait."""

LONGEST_TRYING = 20.0
"""Seconds after which a question is not asked again."""

T = TypeVar("T")
Pause = Callable[[float], object]
Note = Callable[[str], None]


class TemporaryError(Exception):
    """A failure that another try may not see; `after`: seconds that the server asks to wait."""

    def __init__(self, problem: str, after: float | None = None) -> None:
        super().__init__(problem)
        self.after = after


class StoppedError(Exception):
    """Another thread has failed, or the process ends: this one stops where it is."""


def is_temporary(status: int) -> bool:
    """Whether an HTTP status says that the same request may succeed later (RFC 9110, 15.5-6)."""
    return status in (408, 425, 429) or status >= 500


def retry_after(text: str | None) -> float | None:
    """Return the seconds of a Retry-After header: a number or a date (RFC 9110, 10.2.3)."""
    if text is None:
        return None
    if text.strip().isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def note(line: str) -> None:
    """Say something to the user between two bars."""
    print(f"dtt: {line}", file=sys.stderr, flush=True)


class Retries:
    """The tries of one thing: waits before each but the first, and gives up after TRIES.

    The wait doubles from one second, each time between half and all of it (clients that failed
    together should not come back together), and is never shorter than the server asks for.
    """

    def __init__(self, what: str, pause: Pause, note: Note = note) -> None:
        self.what, self.pause, self.note = what, pause, note
        self.failures = 0

    def progress(self) -> None:
        """Something arrived: the tries count from the beginning."""
        self.failures = 0

    def wait(self, problem: TemporaryError) -> None:
        """Wait for the next try; DataError when there is none."""
        self.failures += 1
        after = problem.after or 0.0
        if self.failures >= TRIES:
            raise DataError(
                f"{self.what}: {problem} (tried again and again)",
                "run the same command again later: it goes on where it is",
            ) from None
        if after > LONGEST_WAIT:
            raise DataError(
                f"{self.what}: {problem}, and the server asks to wait {after:,.0f} s",
                "run the same command again then: it goes on where it is",
            ) from None
        backoff = min(2.0 ** (self.failures - 1), LONGEST_BACKOFF) * random.uniform(0.5, 1.0)
        seconds = after + backoff
        self.note(f"{self.what}: {problem}; next try in {seconds:.1f} s")
        self.pause(seconds)


def persist(what: str, attempt: Callable[[], T]) -> T:
    """Return attempt(), tried again while it raises TemporaryError.

    Client libraries try some requests again themselves: tries that take long are not multiplied.
    """
    retries, begun = Retries(what, time.sleep), time.monotonic()
    while True:
        try:
            return attempt()
        except TemporaryError as problem:
            if time.monotonic() - begun > LONGEST_TRYING:
                retries.failures = TRIES
            retries.wait(problem)


def pause_until(stop: threading.Event) -> Pause:
    """A pause that ends with StoppedError as soon as `stop` is set."""

    def pause(seconds: float) -> None:
        if stop.wait(seconds):
            raise StoppedError

    return pause
