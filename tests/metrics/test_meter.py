"""Speed, time left, MFU and parts of the time, by a clock that the test turns."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from dtt.metrics.meter import (
    PARTS,
    Cost,
    Meter,
    short_count,
    short_duration,
    short_flops,
    shown_parts,
)
from dtt.metrics.peak import Peak


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def spend(meter: Meter, clock: Clock, part: str, seconds: float) -> None:
    with meter.part(part):
        clock.now += seconds


def speeds(figures: dict[str, float]) -> tuple[float, float]:
    return figures["tokens_per_second"], figures["seconds_left"]


def times(figures: dict[str, float]) -> dict[str, float]:
    """The parts that took any time."""
    named = {n.removeprefix("time_"): s for n, s in figures.items() if n.startswith("time_")}
    assert sum(named.values()) == pytest.approx(figures["interval_seconds"], rel=1e-12)
    return {name: seconds for name, seconds in named.items() if seconds}


def test_tokens_per_second_and_time_left() -> None:
    clock = Clock()
    meter = Meter(20, clock=clock)
    for _ in range(4):
        meter.add(50)
    clock.now += 8
    assert speeds(meter.read(4)) == (25.0, 16 * 2.0)
    meter.add(50)
    meter.add(50)
    clock.now += 2
    spend(meter, clock, "evaluating", 3)
    # One second a step now; the first reading, with its warm-up, no longer counts.
    assert speeds(meter.read(6)) == (50.0, 14.0)
    meter.add(50)
    clock.now += 3
    # The estimate leans on the newest reading: 3 seconds a step after 1.
    expected = 13 * (0.7 * 3.0 + 0.3 * 1.0)
    assert meter.read(7)["seconds_left"] == pytest.approx(expected, rel=1e-12)
    clock.now += 1
    meter.add(10)
    assert speeds(meter.read(20)) == (10.0, 0.0)


def test_a_reading_without_time_or_steps_is_finite() -> None:
    meter = Meter(5, clock=lambda: 1.0)
    assert meter.read(1)["tokens_per_second"] == 0
    meter.add(3)
    assert meter.read(2)["seconds_left"] >= 0


def test_every_second_has_one_part() -> None:
    clock = Clock()
    meter = Meter(5, clock=clock)
    spend(meter, clock, "data", 1)
    with meter.part("compute"):
        clock.now += 4
        spend(meter, clock, "device", 2)  # on a CPU that is no other device
        spend(meter, clock, "logging", 0.5)
    spend(meter, clock, "optimizer", 8)
    clock.now += 16
    found = times(meter.read(1))
    assert found == {"data": 1, "compute": 6, "logging": 0.5, "optimizer": 8, "rest": 16}
    with meter.part("saving"):
        clock.now += 32
        assert times(meter.read(2)) == {"saving": 32}  # a reading inside of a part
        clock.now += 64
    clock.now += 1
    assert times(meter.read_rest()) == {"saving": 64, "rest": 1}
    assert sum(meter.totals.values()) == 128.5
    line = "where the time went: saving 75%, the rest 13%, optimizer 6%, forward and backward 5%"
    assert meter.where_the_time_went() == f"{line}, waiting for data 1%"


def test_an_error_inside_of_a_part_ends_it() -> None:
    clock = Clock()
    meter = Meter(5, clock=clock)
    with pytest.raises(ValueError), meter.part("saving"):
        clock.now += 1
        raise ValueError
    clock.now += 2
    assert times(meter.read(1)) == {"saving": 1, "rest": 2}


def test_waits_for_other_ranks() -> None:
    clock, reducer = Clock(), [0.0]
    meter = Meter(5, clock=clock, exchanged=lambda: reducer[0], waits=True)

    def wait(seconds: float) -> None:
        with meter.waiting():
            clock.now += seconds

    with meter.part("compute"):
        clock.now += 10
        wait(2)
        reducer[0] = 3.0  # which DDP has waited of the ten
    with meter.part("evaluating"):
        wait(4)
    assert times(meter.read(1)) == {"compute": 7, "exchange": 5, "evaluating": 4}
    with meter.part("compute"):
        thread = threading.Thread(target=wait, args=(1,))  # not the loop's wait
        thread.start()
        thread.join()
    reducer[0] = 50.0  # more than there was: clocks differ
    assert times(meter.read(2)) == {"exchange": 1}


def test_without_knowledge_of_waits_there_is_no_such_part() -> None:
    assert "time_exchange" not in Meter(5).read(1)
    clock = Clock()
    meter = Meter(5, clock=clock, waits=False)
    spend(meter, clock, "compute", 1)
    assert "time_exchange" not in meter.read(1)
    what = "forward and backward (with waits for other ranks) 100%"
    assert meter.where_the_time_went() == f"where the time went: {what}"


class Device:
    """A device that works on what it is given, one thing after the other, while the host goes on.

    An event is done when the device comes to it.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock, self.busy_until = clock, clock.now

    def work(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.clock.now) + seconds

    def wait(self) -> None:
        self.clock.now = max(self.clock.now, self.busy_until)

    def event(self) -> Any:
        device = self

        class Event:
            def record(self) -> None:
                self.at = max(device.busy_until, device.clock.now)

            def query(self) -> bool:
                return self.at <= device.clock.now

            def elapsed_time(self, later: Any) -> float:
                return 1000 * (later.at - self.at)

        return Event()


def step_on(meter: Meter, clock: Clock, device: Device, loading: float) -> None:
    """One step whose forward and backward are 6 s of the device and whose update is 2 s; the host
    needs 0.25 s to give it each, and waits for the device at the end."""
    spend(meter, clock, "data", loading)
    for part, seconds in (("compute", 6), ("optimizer", 2)):
        with meter.part(part):
            device.work(seconds)
            clock.now += 0.25
    with meter.part("device"):
        device.wait()


def test_a_device_that_works_on_its_own_is_measured_by_its_own_clock() -> None:
    clock = Clock()
    device = Device(clock)
    meter = Meter(9, clock=clock, event=device.event)
    for _ in range(3):
        step_on(meter, clock, device, loading=1)
    found = times(meter.read(3))
    assert found == pytest.approx({"data": 3, "compute": 18, "optimizer": 6}, rel=1e-9)


def test_data_that_is_read_while_the_device_works_costs_nothing() -> None:
    clock = Clock()
    device = Device(clock)
    meter = Meter(9, clock=clock, event=device.event)
    with meter.part("compute"):
        device.work(10)
    spend(meter, clock, "data", 4)  # hidden: the device has work for ten
    with meter.part("device"):
        device.wait()
    assert times(meter.read(1)) == pytest.approx({"compute": 10}, rel=1e-9)


def test_what_a_device_has_not_done_yet_counts_later() -> None:
    clock = Clock()
    device = Device(clock)
    meter = Meter(9, clock=clock, event=device.event)
    with meter.part("compute"):
        device.work(5)
        clock.now += 1
    assert times(meter.read(1)) == {"compute": 1}
    with meter.part("device"):
        device.wait()
    assert times(meter.read(2)) == {"compute": 4}


def test_mfu() -> None:
    clock = Clock()
    meter = Meter(5, Cost(2e6, Peak(1e9, "measured"), 2), clock)
    meter.add(500)
    spend(meter, clock, "compute", 1)
    spend(meter, clock, "evaluating", 7)  # is not training
    assert meter.read(1)["mfu"] == 500 * 2e6 / 2e9


def test_only_what_matters_is_shown() -> None:
    figures = {"interval_seconds": 10.0, "time_compute": 8.9, "time_data": 0.6, "time_saving": 0.4}
    assert list(shown_parts(figures)) == [("data", 0.06)]
    assert list(shown_parts({})) == []
    assert set(PARTS) >= {"data", "saving"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (45.4, "45s"),
        (59.6, "1m00s"),
        (200, "3m20s"),
        (3599.6, "1h00m"),
        (7530, "2h05m"),
        (86399.9, "1d00h"),
        (3 * 86400 + 4 * 3600 + 5, "3d04h"),
    ],
)
def test_short_duration(seconds: float, text: str) -> None:
    assert short_duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (1000, "1k"),
        (34_460, "34.5k"),
        (999_999, "1M"),
        (10_700_000, "10.7M"),
        (124_439_808, "124M"),
        (8_030_000_000, "8.03B"),
    ],
)
def test_short_count(number: float, text: str) -> None:
    assert short_count(number) == text


def test_short_flops() -> None:
    assert [short_flops(n) for n in (989.4e12, 5.13e6, 2.5e15, 7.0)] == [
        "989 T",
        "5.13 M",
        "2.5 P",
        "7 ",
    ]
