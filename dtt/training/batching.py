"""How a global batch is divided among ranks and forwards (no torch here)."""

from __future__ import annotations

from dataclasses import dataclass

from dtt.config.schema import Config, Training
from dtt.errors import ConfigError
from dtt.parallel.layout import resolve


@dataclass(frozen=True)
class Division:
    """batch_size = micro_batch_size x accumulation x ranks that have different sequences."""

    micro_batch_size: int
    accumulation: int

    @property
    def rows(self) -> int:
        """Sequences of a rank in a step."""
        return self.micro_batch_size * self.accumulation


def divide(training: Training, ranks: int, pipeline: int = 1) -> Division:
    """Return how `training.batch_size` is divided; ConfigError with the arithmetic if it is not.

    Left alone it is one forward; in a pipeline twice as many as it has ranks, or as many, so that
    they have something to do at the same time.
    """
    batch, micro, forwards = (
        training.batch_size,
        training.micro_batch_size,
        training.accumulation,
    )
    if micro is None and forwards is None:
        twice = pipeline > 1 and batch % (2 * pipeline * ranks) == 0
        forwards = pipeline * (2 if twice else 1)
    if micro is None:
        assert forwards is not None
        if batch % (forwards * ranks):
            raise ConfigError(
                f"training.batch_size ({batch}) is not divisible by accumulation ({forwards}) "
                f"x ranks ({ranks})",
                f"the nearest batch sizes are {_nearest(batch, forwards * ranks)}",
            )
        return Division(batch // (forwards * ranks), forwards)
    if batch % (micro * ranks):
        raise ConfigError(
            f"training.batch_size ({batch}) is not divisible by micro_batch_size ({micro}) "
            f"x ranks ({ranks})",
            f"the nearest batch sizes are {_nearest(batch, micro * ranks)}",
        )
    derived = batch // (micro * ranks)
    if forwards not in (None, derived):
        raise ConfigError(
            f"training.batch_size ({batch}) is not micro_batch_size ({micro}) x ranks ({ranks}) "
            f"x accumulation ({forwards})",
            f"leave out accumulation (it would be {derived}) or micro_batch_size",
        )
    return Division(micro, derived)


def require_layout(config: Config, ranks: int) -> None:
    """Raise ConfigError, with the arithmetic, if so many ranks cannot share the run's work."""
    layout = resolve(config.parallel, config.model, ranks)
    divide(config.training, layout.data, layout.pipeline)


def _nearest(batch: int, unit: int) -> str:
    below = batch // unit * unit
    return f"{below} and {below + unit}" if below else f"{unit}"
