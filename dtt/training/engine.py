"""Which loop trains: dtt's own, or Lightning's."""

from __future__ import annotations

from importlib import import_module

import torch

from dtt.config.schema import Training
from dtt.errors import ConfigError
from dtt.machine import is_installed
from dtt.parallel.layout import Layout
from dtt.training import loop
from dtt.training.state import Run, TrainState


def fit(run: Run) -> TrainState:
    """Train to run.steps, or until a signal asks to stop, and save, by the engine asked for."""
    if run.config.training.engine == "lightning":
        from dtt.lightning import engine

        return engine.fit(run)
    return loop.fit(run)


def require_engine(training: Training) -> None:
    """Load the engine, which takes seconds; ConfigError if its package is missing.

    Called before workers are forked, which share what is loaded.
    """
    if training.engine == "lightning":
        if not is_installed("lightning"):
            raise ConfigError(
                "training.engine is lightning, but the package lightning is missing",
                "pip install 'dtt[lightning]', or use training.engine dtt",
            )
        import_module("dtt.lightning.engine")


def refuse_for_engine(training: Training, layout: Layout, dtype: torch.dtype) -> None:
    """Raise ConfigError for what dtt's own engine does, and Lightning's Trainer does not."""
    if training.engine == "dtt":
        return
    wrong = None
    if not layout.is_plain:
        wrong = f"a model that ranks divide ({layout})"
    elif training.fp8:
        wrong = "training.fp8"
    elif dtype == torch.float16:
        wrong = "fp16 and its loss scaling"
    if wrong is not None:
        raise ConfigError(
            f"training.engine lightning does not do {wrong}",
            "use training.engine dtt, or leave that off",
        )
