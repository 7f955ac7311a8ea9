"""`training.engine: lightning`: a run of dtt, on dtt's ranks, in a Trainer of Lightning's."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from dtt.dist import Runtime
from dtt.lightning.data import DttData
from dtt.lightning.module import DttModule
from dtt.training.state import Run, TrainState


def fit(run: Run) -> TrainState:
    """Train to run.steps, or until a signal asks to stop, and save: as dtt.training.loop.fit does,
    with the same files, lines and errors."""
    module = DttModule.of(run)
    with _quiet():
        trainer = Trainer(
            **_ranks(run.runtime),
            max_epochs=1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=run.folder,
        )
        try:
            trainer.fit(module, DttData(run.config))
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):  # of which Lightning makes exit(1)
                raise stop.__context__ from None
            raise
    return run.state


def _ranks(runtime: Runtime) -> dict[str, Any]:
    """Return what a Trainer is told of the ranks.

    Each is a node of one device for Lightning, which knows no ranks that are placed in turn.
    """
    kind, index = runtime.device.type, runtime.device.index or 0
    told: dict[str, Any] = {
        "accelerator": kind,
        "devices": [index] if kind == "cuda" else 1,
        "num_nodes": runtime.ranks,
        "plugins": [_Placed(runtime)],
    }
    if runtime.ranks > 1:
        told["strategy"] = DDPStrategy(gradient_as_bucket_view=True)
    return told


class _Placed(ClusterEnvironment):
    """The ranks that dtt has started, or was started as; they have met."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self._runtime = runtime

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return ""  # nobody asks: the ranks have met

    @property
    def main_port(self) -> int:
        return 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._runtime.ranks

    def set_world_size(self, size: int) -> None:
        assert size == self._runtime.ranks

    def global_rank(self) -> int:
        return self._runtime.rank

    def set_global_rank(self, rank: int) -> None:
        assert rank == self._runtime.rank

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return self._runtime.rank


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave the console to dtt: what Lightning says of itself is not about this run."""
    logs = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        try:
            yield
        finally:
            for log, level in zip(logs, before, strict=True):
                log.setLevel(level)
