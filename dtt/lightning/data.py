"""dtt's batches as Lightning's data: a forward of one rank at a time, in dtt's order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule
from torch import Tensor

from dtt.config.load import named
from dtt.config.schema import Config
from dtt.data.loader import Batch
from dtt.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from dtt.lightning.module import DttModule


@dataclass(frozen=True)
class Micro:
    """What one rank has in one forward, on its device."""

    batch: Batch
    """This rank's share of the whole step."""
    tokens: Tensor
    """[micro_batch_size, context]"""
    given: dict[str, Tensor]
    """What else an Objective takes, with as many rows."""


class Micros:
    """The forwards that are left of a run, all of one epoch of Lightning's.

    dtt's steps go over the ends of epochs, so Lightning sees none.
    """

    def __init__(self, module: DttModule) -> None:
        self._module = module

    def __len__(self) -> int:
        """Forwards of the whole run, those before a Lightning checkpoint that it continues too."""
        run, loop = self._module.run, self._module.trainer.fit_loop.epoch_loop
        left = (run.steps - run.state.step) * run.stepper.division.accumulation
        return left + int(loop.batch_progress.current.ready)

    def __iter__(self) -> Iterator[Micro]:
        run = self._module.run
        division, size = run.stepper.division, run.stepper.division.micro_batch_size
        done = self._module.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if done % division.accumulation:
            raise CheckpointError(
                f"the checkpoint of Lightning was saved after {done} forwards, in the midst of a "
                f"step of {division.accumulation}, whose gradients it does not have",
                "continue from one that was saved after a step (every_n_train_steps)",
            )
        with closing(run.loader.iter_from(run.state.step)) as batches:
            for step in range(run.state.step, run.steps):
                with run.meter.part("data"):
                    batch = next(batches)
                    tokens, given = run.stepper.inputs(batch, step)
                for first in range(0, division.rows, size):
                    rows = slice(first, first + size)
                    yield Micro(batch, tokens[rows], {n: t[rows] for n, t in given.items()})

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a batch is a function of the step, which the module knows."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing; that it is here tells Lightning that it may continue within an epoch."""


class Validation:
    """One item, which stands for the whole validation: dtt's `evaluate` has batches of its own."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        yield "val"


class DttData(LightningDataModule):
    """The text of a configuration, for a DttModule of the same one, which prepares it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = named(config)

    def train_dataloader(self) -> Micros:
        """Return the forwards that are left of the run."""
        return Micros(self._module())

    def val_dataloader(self) -> Validation:
        """Return what has `DttModule.validation_step` measure the validation loss."""
        self._module()
        return Validation()

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Return the batch: it is on the device."""
        return batch

    def _module(self) -> DttModule:
        from dtt.lightning.module import DttModule

        module = self.trainer.lightning_module if self.trainer is not None else None
        if not isinstance(module, DttModule):
            raise ConfigError("DttData gives batches to a DttModule only", "train one with it")
        for part in ("data", "tokenizer", "seed"):
            if getattr(module.config, part) != getattr(self.config, part):
                raise ConfigError(
                    f"DttData and DttModule differ in {part}", "give both the same configuration"
                )
        return module
