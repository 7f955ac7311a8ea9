"""Schedules against formulae written independently, and against torch's where they coincide."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.optim import lr_scheduler

from dtt.config.optim import Schedule
from dtt.errors import ConfigError
from dtt.optim.schedule import CURVES, learning_rate, warmup_steps

STEPS, WARMUP, END = 60, 10, 0.1


def rates(steps: int = STEPS, **settings: Any) -> list[float]:
    settings = {"warmup_steps": WARMUP, "min_lr_ratio": END} | settings
    return [learning_rate(Schedule(**settings), step, steps) for step in range(steps)]


def torch_rates(
    build: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], steps: int
) -> list[float]:
    """The rates of a torch scheduler over a peak of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, found = build(optimizer), []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


def test_names_are_those_of_the_schema() -> None:
    names = Schedule.model_fields["name"].annotation
    assert set(CURVES) == set(names.__args__)  # type: ignore[union-attr]


def test_cosine_is_torchs() -> None:
    expected = torch_rates(
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS - 1 - WARMUP, eta_min=END),
        STEPS - WARMUP,
    )
    assert rates(name="cosine")[WARMUP:] == pytest.approx(expected, abs=1e-12)


def test_linear_is_torchs() -> None:
    expected = torch_rates(
        lambda o: lr_scheduler.LinearLR(o, 1.0, END, total_iters=STEPS - 1 - WARMUP),
        STEPS - WARMUP,
    )
    assert rates(name="linear")[WARMUP:] == pytest.approx(expected, abs=1e-12)


def test_exponential_is_torchs() -> None:
    gamma = END ** (1 / (STEPS - 1 - WARMUP))
    expected = torch_rates(lambda o: lr_scheduler.ExponentialLR(o, gamma), STEPS - WARMUP)
    assert rates(name="exponential")[WARMUP:] == pytest.approx(expected, abs=1e-12)


def test_onecycle_is_torchs() -> None:
    expected = torch_rates(
        lambda o: lr_scheduler.OneCycleLR(
            o,
            max_lr=1.0,
            total_steps=STEPS + 1,  # torch lets nobody step past the last rate
            pct_start=(WARMUP + 1) / (STEPS + 1),
            div_factor=25,
            final_div_factor=1 / (25 * END),
            cycle_momentum=False,
        ),
        STEPS,
    )
    assert rates(name="onecycle", steps=STEPS + 1)[:STEPS] == pytest.approx(expected, abs=1e-12)
    assert rates(name="onecycle")[-1] == pytest.approx(END)


def test_warmup_is_torchs_linear() -> None:
    expected = torch_rates(
        lambda o: lr_scheduler.LinearLR(o, 1 / (WARMUP + 1), 1.0, total_iters=WARMUP), WARMUP
    )
    for name in set(CURVES) - {"onecycle"}:
        assert rates(name=name)[:WARMUP] == pytest.approx(expected, abs=1e-12)


def test_wsd_holds_then_falls_by_one_minus_sqrt() -> None:
    found = rates(name="wsd", decay_fraction=0.25)
    assert found[WARMUP : STEPS - 15] == [1.0] * (STEPS - 15 - WARMUP)
    tail = [END + (1 - END) * (1 - math.sqrt(k / 15)) for k in range(1, 16)]
    assert found[-15:] == pytest.approx(tail, abs=1e-12)


def test_wsd_decay_never_cuts_the_warmup() -> None:
    found = rates(name="wsd", decay_fraction=1.0)
    assert found[WARMUP - 1] == pytest.approx(WARMUP / (WARMUP + 1))
    assert found[WARMUP] == 1.0 > found[WARMUP + 1]


def test_constant_stays() -> None:
    assert rates(name="constant")[WARMUP:] == [1.0] * (STEPS - WARMUP)


@pytest.mark.parametrize("name", sorted(CURVES))
@pytest.mark.parametrize("warmup", [0, 1, 59, 60])
def test_every_run_starts_above_zero_peaks_once_and_stays_within_it(name: str, warmup: int) -> None:
    found = rates(name=name, warmup_steps=warmup)
    assert found[0] > 0 and max(found) <= 1
    assert found[: warmup + 1] == sorted(found[: warmup + 1])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    if warmup < STEPS:
        assert found[warmup] == 1
    if warmup <= 1 and name != "constant":
        assert found[-1] == pytest.approx(END)


@pytest.mark.parametrize("name", sorted(CURVES))
def test_shortest_run(name: str) -> None:
    assert rates(name=name, steps=1, warmup_steps=0) == [1.0]


@pytest.mark.parametrize(("steps", "expected"), [(5, 0), (50, 5), (1000, 100), (90_000, 100)])
def test_default_warmup(steps: int, expected: int) -> None:
    assert warmup_steps(Schedule(), steps) == expected


def test_warmup_longer_than_the_run_names_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"warmup_steps \(61\).*\(60 steps\)"):
        learning_rate(Schedule(warmup_steps=61), 0, 60)


def test_exponential_cannot_end_at_zero() -> None:
    with pytest.raises(ValidationError, match="min_lr_ratio 0"):
        Schedule(name="exponential", min_lr_ratio=0)


@pytest.mark.parametrize("step", [-1, 60])
def test_step_outside_the_run(step: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        learning_rate(Schedule(), step, 60)
