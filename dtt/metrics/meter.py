"""Speed and time left, from one tested function."""

from __future__ import annotations

import time
from collections.abc import Callable


class Meter:
    """Tokens per second and seconds left, over the steps since the last reading.

    Pauses (validation, samples, waiting for a checkpoint) are taken out with `paused`.
    """

    def __init__(self, steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._steps, self._clock = steps, clock
        self._since, self._tokens, self._count = clock(), 0, 0
        self._pause = 0.0
        self._step_seconds: float | None = None
        self._readings = 0
        self.last: dict[str, float] = {}
        """What `read` returned last."""
        self.slowest = 0.0
        """Seconds of a step, in the slowest interval that was read."""

    def add(self, tokens: int) -> None:
        """Count one optimizer step of `tokens` target tokens."""
        self._tokens += tokens
        self._count += 1

    def paused(self, seconds: float) -> None:
        """Leave `seconds` that were not training out of the next reading."""
        self._pause += seconds

    def read(self, step: int) -> dict[str, float]:
        """Return tokens_per_second and seconds_left at `step`, and start a new interval."""
        now = self._clock()
        seconds = max(now - self._since - self._pause, 1e-9)
        per_step = seconds / max(self._count, 1)
        # The first reading has warm-up in it: an estimate until there is another, then forgotten.
        old = self._step_seconds if self._readings > 1 else None
        self._step_seconds = per_step if old is None else 0.7 * per_step + 0.3 * old
        self._readings += 1
        self.slowest = max(self.slowest, per_step)
        speed = self._tokens / seconds
        self._since, self._tokens, self._count, self._pause = now, 0, 0, 0.0
        self.last = {
            "tokens_per_second": speed,
            "seconds_left": (self._steps - step) * self._step_seconds,
        }
        return self.last


def short_duration(seconds: float) -> str:
    """Return a duration as people read it: 45s, 3m20s, 2h05m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def short_count(number: float) -> str:
    """Return a count as people read it: 950, 34.5k, 10.7M, 8.03B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit * 0.9995:  # what is rounded to three digits must not become 1e+03
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"
