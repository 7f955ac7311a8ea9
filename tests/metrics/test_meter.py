"""Speed and time left, by a clock that the test turns."""

from __future__ import annotations

import pytest

from dtt.metrics.meter import Meter, short_count, short_duration


def test_tokens_per_second_and_time_left() -> None:
    now = [100.0]
    meter = Meter(20, clock=lambda: now[0])
    for _ in range(4):
        meter.add(50)
    now[0] += 8
    assert meter.read(4) == {"tokens_per_second": 25.0, "seconds_left": 16 * 2.0}
    meter.add(50)
    meter.add(50)
    now[0] += 5
    meter.paused(3)  # a validation in between
    # One second a step now; the first reading, with its warm-up, no longer counts.
    assert meter.read(6) == {"tokens_per_second": 50.0, "seconds_left": 14.0}
    meter.add(50)
    now[0] += 3
    # The estimate leans on the newest reading: 3 seconds a step after 1.
    expected = 13 * (0.7 * 3.0 + 0.3 * 1.0)
    assert meter.read(7)["seconds_left"] == pytest.approx(expected, rel=1e-12)
    now[0] += 1
    meter.add(10)
    assert meter.read(20) == {"tokens_per_second": 10.0, "seconds_left": 0.0}


def test_a_reading_without_time_or_steps_is_finite() -> None:
    meter = Meter(5, clock=lambda: 1.0)
    assert meter.read(1)["tokens_per_second"] == 0
    meter.add(3)
    meter.paused(10)
    assert meter.read(2)["seconds_left"] >= 0


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
