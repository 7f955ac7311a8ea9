"""TensorBoard and W&B: each gets the figures of every console line and of every validation.

Neither is the record of a run: that is metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

WANDB_INIT_SECONDS = 20
"""wandb's own default waits for 101 s when its server is down."""

Warn = Callable[[str], None]


class Tracker(Protocol):
    """Something that shows curves."""

    def log(self, step: int, figures: Mapping[str, float | None]) -> None: ...
    def text(self, step: int, name: str, text: str) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard, for `tensorboard --logdir RUN/tensorboard`."""

    def __init__(self, folder: Path, config: dict[str, Any], warn: Warn) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, figures: Mapping[str, float | None]) -> None:
        for name, value in figures.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A W&B run; offline (`wandb sync` later) if WANDB_MODE says so or the server is not there."""

    def __init__(self, folder: Path, config: dict[str, Any], warn: Warn) -> None:
        import wandb

        options: dict[str, Any] = {
            "project": "dtt",
            "name": folder.name,
            "dir": str(folder),
            "config": config,
            "settings": wandb.Settings(init_timeout=WANDB_INIT_SECONDS),
        }
        try:
            self._run = wandb.init(**options)
        except wandb.Error as error:
            warn(f"W&B is not reachable ({error}); logging offline, `wandb sync` sends it later")
            self._run = wandb.init(**options, mode="offline")

    def log(self, step: int, figures: Mapping[str, float | None]) -> None:
        self._run.log({k: v for k, v in figures.items() if v is not None}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, dict[str, Any], Warn], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
}
