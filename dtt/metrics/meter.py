"""Speed, time left, MFU, and where the time goes: one clock and one tested function."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from dtt.metrics.peak import Peak

PARTS = {
    "data": "waiting for data",
    "compute": "forward and backward",
    "exchange": "waiting for other ranks",
    "optimizer": "optimizer",
    "saving": "saving",
    "evaluating": "evaluating",
    "sampling": "sampling",
    "logging": "logging",
    "rest": "the rest",
}
"""What the wall clock is divided into. On a GPU, `compute` and `optimizer` share the time in which
it works as its own clock has it, and `data` is only what it was idle for."""
PAUSES = ("saving", "evaluating", "sampling")
"""Parts that are not training: tokens per second and MFU leave them out."""
WAITING = "device"
"""While the host waits for the device to finish a step; shared by compute and optimizer."""


class Event(Protocol):
    """A point in a device's stream of work, as torch.cuda.Event is one."""

    def record(self) -> Any: ...
    def query(self) -> bool: ...
    def elapsed_time(self, later: Any, /) -> float: ...


@dataclass(frozen=True)
class Cost:
    """What a run computes for a token, and what its devices could compute."""

    flops: float
    """Of a token's forward and backward pass."""
    peak: Peak
    """Of one device."""
    devices: int

    def mfu(self, tokens_per_second: float) -> float:
        """Return the model FLOPs utilisation, as a share."""
        return tokens_per_second * self.flops / (self.peak.flops * self.devices)


class Meter:
    """Figures of the steps since the last reading; every second of the wall clock has one part.

    `event` makes device events where the device works on its own (CUDA); nothing waits for them.
    `exchanged` counts the seconds of `compute` in which this process has waited for other ranks
    beside those that `waiting` sees. `waits` says whether these two see all of it: if not, waits
    are a part of `compute`, and there is no part `exchange`; None: there are no other ranks.
    """

    def __init__(
        self,
        steps: int,
        cost: Cost | None = None,
        clock: Callable[[], float] = time.perf_counter,
        event: Callable[[], Event] | None = None,
        exchanged: Callable[[], float] | None = None,
        waits: bool | None = None,
    ) -> None:
        self._parts = {name: text for name, text in PARTS.items() if name != "exchange" or waits}
        if waits is False:
            self._parts["compute"] += " (with waits for other ranks)"
        self.cost = cost
        self._steps, self._clock = steps, clock
        self._exchanged = exchanged
        self._thread = threading.get_ident()
        self._device = None if event is None else _DeviceTimes(event)
        self._part = "rest"
        self._seconds = self._zeros()
        self._mark = clock()
        self._exchange_before = 0.0
        self._tokens = self._count = self._readings = 0
        self._step_seconds: float | None = None
        self.last: dict[str, float] = {}
        """What `read` returned last."""
        self.slowest = 0.0
        """Seconds of a step, in the slowest interval that was read."""
        self.totals = dict.fromkeys(self._parts, 0.0)
        """Seconds by part since the meter was made, up to the last reading."""

    def part(self, name: str) -> _Part:
        """Return a context whose time is this part's; one inside of another stops the outer's."""
        return _Part(self, name)

    def waiting(self) -> AbstractContextManager[None]:
        """Return the context of a wait for other ranks: `exchange` inside of a step's work, and
        else a part of what it is for, as of a validation."""
        inside = self._part in ("compute", "optimizer") and threading.get_ident() == self._thread
        return self.part("exchange") if inside else nullcontext()

    def add(self, tokens: int) -> None:
        """Count one optimizer step of `tokens` target tokens."""
        self._tokens += tokens
        self._count += 1

    def read(self, step: int) -> dict[str, float]:
        """Return the figures at `step` and start a new interval.

        tokens_per_second, mfu (with a cost), seconds_left, interval_seconds, and time_PART in
        seconds for each part, which add up to interval_seconds.
        """
        parts = self._divided()
        total = sum(parts.values())
        training = max(total - sum(parts[name] for name in PAUSES), 1e-9)
        per_step = training / max(self._count, 1)
        # The first reading has warm-up in it: an estimate until there is another, then forgotten.
        old = self._step_seconds if self._readings > 1 else None
        self._step_seconds = per_step if old is None else 0.7 * per_step + 0.3 * old
        self._readings += 1
        self.slowest = max(self.slowest, per_step)
        speed = self._tokens / training
        self._tokens = self._count = 0
        figures = {"tokens_per_second": speed}
        if self.cost is not None:
            figures["mfu"] = self.cost.mfu(speed)
        figures["seconds_left"] = (self._steps - step) * self._step_seconds
        self.last = figures | _named(parts)
        return dict(self.last)

    def read_rest(self) -> dict[str, float]:
        """Return interval_seconds and each time_PART since the last reading, for the end."""
        return _named(self._divided())

    def where_the_time_went(self) -> str:
        """Return a line for people: the parts since the start that are not next to nothing."""
        total = sum(self.totals.values())
        ranked = sorted(self.totals.items(), key=lambda item: -item[1])
        shown = [f"{self._parts[name]} {s / total:.0%}" for name, s in ranked if s > 0.005 * total]
        return f"where the time went: {', '.join(shown)}"

    def enter(self, name: str) -> str:
        """Give the time from now on to a part; return the one that had it."""
        now, before = self._clock(), self._part
        self._seconds[before] += now - self._mark
        self._mark, self._part = now, name
        if self._device is not None:
            self._device.change(before, name)
        return before

    def _zeros(self) -> dict[str, float]:
        return dict.fromkeys((*self._parts, WAITING), 0.0)

    def _divided(self) -> dict[str, float]:
        """Return the seconds of each part since the last call, which add up to the wall clock."""
        self.enter(self._part)
        found = self._seconds
        self._seconds = self._zeros()
        waited = found.pop(WAITING)
        if self._device is None:
            found["compute"] += waited
        else:
            _share(found, waited, self._device.collect())
        if self._exchanged is not None:
            exchanged = self._exchanged()
            share = min(max(exchanged - self._exchange_before, 0.0), found["compute"])
            self._exchange_before = exchanged
            found["exchange"] += share
            found["compute"] -= share
        for name, seconds in found.items():
            self.totals[name] += seconds
        return found


def _named(parts: Mapping[str, float]) -> dict[str, float]:
    return {"interval_seconds": sum(parts.values())} | {
        f"time_{name}": seconds for name, seconds in parts.items()
    }


class _Part(AbstractContextManager[None]):
    """What `Meter.part` returns: light, since a step enters several."""

    __slots__ = ("_before", "_meter", "_name")

    def __init__(self, meter: Meter, name: str) -> None:
        self._meter, self._name, self._before = meter, name, ""

    def __enter__(self) -> None:
        self._before = self._meter.enter(self._name)

    def __exit__(self, *error: object) -> None:
        self._meter.enter(self._before)


class _DeviceTimes:
    """How long a device worked for the parts that give it work, by events in its stream."""

    MEASURED = ("compute", "optimizer")

    def __init__(self, event: Callable[[], Event]) -> None:
        self._event = event
        self._open: Event | None = None
        self._pairs: list[tuple[str, Event, Event]] = []

    def change(self, before: str, name: str) -> None:
        """Mark in the stream that what is given to the device is another part's from now on."""
        if before == name:
            return
        if before in self.MEASURED and self._open is not None:
            end = self._event()
            end.record()
            self._pairs.append((before, self._open, end))
            self._open = None
        if name in self.MEASURED:
            self._open = self._event()
            self._open.record()

    def collect(self) -> dict[str, float]:
        """Return the seconds by part of what the device has done by now, each counted once."""
        found = dict.fromkeys(self.MEASURED, 0.0)
        while self._pairs and self._pairs[0][2].query():
            name, begin, end = self._pairs.pop(0)
            found[name] += begin.elapsed_time(end) / 1000
        return found


def _share(found: dict[str, float], waited: float, device: Mapping[str, float]) -> None:
    """Divide the host's time between the parts of a device that works on its own.

    The host gives work to the device and waits for it (`waited`): together that is the time that
    the device's parts share. Waiting for data while the device works costs nothing, and is theirs.
    """
    worked = sum(device.values())
    if not worked:  # nothing has ended since the last time
        found["compute"] += waited
        return
    pool = waited + sum(found[name] for name in device)
    hidden = min(found["data"], max(worked - pool, 0.0))
    found["data"] -= hidden
    for name, seconds in device.items():
        found[name] = (pool + hidden) * seconds / worked


def shown_parts(figures: Mapping[str, float], least: float = 0.05) -> Iterable[tuple[str, float]]:
    """Yield the parts that took at least a share of an interval and are no training, and shares."""
    total = figures.get("interval_seconds", 0.0)
    for name in PARTS:
        share = figures.get(f"time_{name}", 0.0) / total if total else 0.0
        if share >= least and name not in ("compute", "optimizer", "rest"):
            yield name, share


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


COUNTS = ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1, ""))
PREFIXES = ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"), (1, " "))


def short_count(number: float) -> str:
    """Return a count as people read it: 950, 34.5k, 10.7M, 8.03B."""
    return _short(number, COUNTS)


def short_flops(number: float) -> str:
    """Return operations with their prefix, as in 989 T or 5.13 M; the unit comes behind it."""
    return _short(number, PREFIXES)


def _short(number: float, units: Sequence[tuple[float, str]]) -> str:
    # What is rounded to three digits must not become 1e+03.
    limit, unit = next((row for row in units if number >= row[0] * 0.9995), units[-1])
    return f"{number / limit:.3g}{unit}"
