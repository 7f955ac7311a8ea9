"""Learning rate over the run: a warm-up, then one of six curves.

For a run of N steps with w steps of warm-up, the factor of the peak learning rate is

    (s + 1) / (w + 1)        at step s < w: linear, never 0 at the first step
    curve(p)                 at step s >= w, with p = (s - w) / (N - 1 - w)

so that step w is the first at the peak, and the last step (p = 1) has `min_lr_ratio` of it.
Two shapes bend these rules: wsd holds the peak until the last `decay_fraction` of the run, and
onecycle warms up by half a cosine wave from 1/25 of the peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dtt.config.optim import Schedule
from dtt.errors import ConfigError

ONECYCLE_START = 1 / 25  # of the peak, as in Smith and Topin 2017 (arxiv.org/abs/1708.07120)


def _cosine(progress: float, end: float) -> float:
    """Loshchilov and Hutter 2016 (arxiv.org/abs/1608.03983)."""
    return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2


def _linear(progress: float, end: float) -> float:
    return 1 - (1 - end) * progress


def _one_minus_sqrt(progress: float, end: float) -> float:
    """Best of the decays after a hold in Haegele et al. 2024 (arxiv.org/abs/2405.18392)."""
    return 1 - (1 - end) * math.sqrt(progress)


def _constant(progress: float, end: float) -> float:
    return 1.0


def _exponential(progress: float, end: float) -> float:
    return float(end**progress)


CURVES: dict[str, Callable[[float, float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _one_minus_sqrt,
    "constant": _constant,
    "exponential": _exponential,
    "onecycle": _cosine,
}


def warmup_steps(schedule: Schedule, steps: int) -> int:
    """Return the optimizer steps of warm-up in a run of `steps`: a tenth, 100 at most, by default.

    A warm-up that is longer than the run is a ConfigError.
    """
    if schedule.warmup_steps is None:
        return min(100, steps // 10)
    if schedule.warmup_steps > steps:
        raise ConfigError(
            f"schedule.warmup_steps ({schedule.warmup_steps}) is longer than the run"
            f" ({steps} steps)",
            f"set it to {steps} or less, or train for more steps",
        )
    return schedule.warmup_steps


def learning_rate(schedule: Schedule, step: int, steps: int) -> float:
    """Return the factor of the peak learning rate at optimizer step `step` of 0 ... `steps` - 1.

    The formula is at the top of this file; it depends on nothing else, so a run that continues
    at any step has the rates of one that never stopped. A schedule that cannot be followed is a
    ConfigError, a step outside the run a ValueError.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step {step} is outside a run of {steps} steps")
    warmup = warmup_steps(schedule, steps)
    if step < warmup:
        return _warmup(schedule, step, warmup)
    start = _decay_start(schedule, steps, warmup)
    progress = max(0, step - start) / max(1, steps - 1 - start)
    return CURVES[schedule.name](progress, schedule.min_lr_ratio)


def _warmup(schedule: Schedule, step: int, warmup: int) -> float:
    if schedule.name == "onecycle":
        return _cosine(1 - step / warmup, ONECYCLE_START)
    return (step + 1) / (warmup + 1)


def _decay_start(schedule: Schedule, steps: int, warmup: int) -> int:
    """Return the last step at the peak: `warmup`, or for wsd the last step of the hold."""
    if schedule.name != "wsd":
        return warmup
    decaying = max(1, round(schedule.decay_fraction * steps))
    return max(warmup, steps - 1 - decaying)
