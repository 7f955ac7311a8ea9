"""A run of dtt as a LightningModule: the same loss, gradients, updates, files and checkpoints.

What Lightning would change is undone: it divides the loss by the forwards of a step, its DDP takes
the mean over ranks, and dtt's loss is a sum over the step's target tokens on all ranks.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from dtt.config.load import named
from dtt.config.schema import Config
from dtt.dist import Runtime
from dtt.errors import CheckpointError, ConfigError
from dtt.lightning.data import Micro
from dtt.lightning.optimizer import OneOptimizer
from dtt.metrics.loggers import MetricsFile
from dtt.optim.schedule import learning_rate
from dtt.place import Place
from dtt.training.loop import (
    Due,
    Readings,
    check_step,
    count_step,
    end,
    milestones,
    save,
    validate,
)
from dtt.training.picture import draw_loss
from dtt.training.preemption import Preemption
from dtt.training.run import open_run
from dtt.training.state import Run

_REPLICATED: list[Any] = []
"""What DDP has wrapped, never freed, for the reason that dtt.parallel.apply gives."""


class DttModule(LightningModule):
    """A run of dtt: `trainer.fit(DttModule(config), DttData(config))` makes or continues it.

    The losses are those of dtt's own engine with the same configuration, on one rank and with DDP.
    Everything of the configuration holds, so the Trainer must not set precision, accumulation or
    clipping too (ConfigError). `resume` and `fresh` are as in `dtt.train`. SIGINT, SIGTERM and
    SIGUSR1 save after the step and end the fit.
    """

    run: Run

    def __init__(
        self, config: Config, *, resume: str | Path | None = None, fresh: bool = False
    ) -> None:
        super().__init__()
        training = config.training.model_copy(update={"engine": "lightning"})
        self.config = named(config.model_copy(update={"training": training}))
        self._opens = True
        self._resume, self._fresh = None if resume is None else str(resume), fresh
        self._opened, self._started = ExitStack(), ExitStack()
        self._nats: Tensor | None = None

    @classmethod
    def of(cls, run: Run) -> DttModule:
        """Return the module of a run that is open already, and stays so."""
        module = cls(run.config)
        module.run, module._opens = run, False
        return module

    def setup(self, stage: str) -> None:
        """Open the run on the device that Lightning has chosen."""
        if stage != "fit":
            raise ConfigError(
                f"a DttModule is for trainer.fit, not for {stage}",
                "dtt.load_run gives the trained model, `dtt evaluate` measures it",
            )
        if self._opens:
            _refuse_trainer(self.trainer, self.config)
            runtime = _runtime(self.trainer)
            if self.config.training.threads is not None:
                torch.set_num_threads(self.config.training.threads)
            opened = open_run(self.config, runtime, self._resume, self._fresh)
            self.run = self._opened.enter_context(opened)
            if self.run.state.step >= self.run.steps and self.trainer.ckpt_path is None:
                self.run.reporter.info(f"{self.run.folder} is already complete")
        accumulation = self.run.stepper.division.accumulation
        if self.trainer.accumulate_grad_batches not in (1, accumulation):
            raise ConfigError(
                f"the Trainer accumulates {self.trainer.accumulate_grad_batches} batches, and the "
                f"configuration says {accumulation}",
                "leave accumulate_grad_batches out",
            )
        self.trainer.accumulate_grad_batches = accumulation
        (self.objective,) = self.run.stepper.model.stages
        # Ranks have counts of their own in buffers.
        names = [f"objective.{name}" for name, _ in self.objective.named_buffers()]
        self._ddp_params_and_buffers_to_ignore = names

    def configure_callbacks(self) -> list[Callback]:
        """Return what closes the run after an error."""
        return [_Closing()]

    def configure_optimizers(self) -> OneOptimizer:
        """Return all of the configuration's optimizers as one."""
        return OneOptimizer(self.run.stepper.optimizer, self.run.meter)

    def on_train_start(self) -> None:
        """Take over signals: Lightning's handlers would not let all ranks stop at one step."""
        run = self.run
        if run.runtime.ranks > 1:
            _REPLICATED.append(self.trainer.strategy.model)
        self.due = Due(run.config, run.steps, run.loader.steps_per_epoch)
        self.readings = Readings(run)
        self._preemption = self._started.enter_context(Preemption())
        if not self._opens:  # else Lightning has a bar
            self._started.enter_context(run.reporter.bar(run.state.step))
        if run.state.owes_validation:
            milestones(run, self.due, self.readings, self._preemption.asked)
            self.trainer.should_stop = self._is_over()

    def training_step(self, micro: Micro, batch_idx: int) -> Tensor:
        """Return the loss whose gradient, averaged over ranks, is a part of the step's."""
        scale = 1 / micro.batch.count * self.run.runtime.ranks
        with self.run.meter.part("compute"):
            self.objective.model.scale_auxiliary(scale)
            part: Tensor = self.objective(micro.tokens, **micro.given)
            if self._nats is None:
                wide = torch.float32 if part.device.type == "mps" else torch.float64
                self._nats = torch.zeros((), dtype=wide, device=part.device)
            self._nats += part.detach()
            self._batch = micro.batch
            return part * scale

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Go backward as if Lightning had not divided the loss, bit for bit: n / n is 1."""
        with self.run.meter.part("compute"):
            whole = torch.full_like(loss, self.trainer.accumulate_grad_batches)
            torch.autograd.backward(loss, whole)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip; NumericError if the loss or the gradient is not finite, before there is an update.

        On an accelerator that is found out a step later, before anything is saved.
        """
        assert self._nats is not None
        run = self.run
        with run.meter.part("compute"):
            result = run.stepper.finish(self._batch, self._nats, self._preemption.asked)
        self._nats = None
        check_step(run, self.due, self.readings, self._factor(), result)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Update with the learning rate of the schedule, and do what is due after the step.

        Here, and not at the end of the batch, where callbacks may save before this is called.
        """
        run = self.run
        run.stepper.optimizer.set_lr(self._factor())
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        run.stepper.optimizer.zero_grad()
        run.stepper.model.rebalance()
        count_step(run, self.due, self.readings, self._batch.count, self._preemption.asked)
        self.trainer.should_stop |= self._is_over()

    def _is_over(self) -> bool:
        return self.readings.stop or self.run.state.step >= self.run.steps

    def _factor(self) -> float:
        return learning_rate(self.run.config.schedule, self.run.state.step, self.run.steps)

    def on_train_batch_end(self, outputs: Any, batch: Micro, batch_idx: int) -> None:
        """Hand the figures of a step to Lightning's loggers and bar."""
        if self._nats is None and self._opens:  # no forwards of this step are left
            self.log_dict(self.readings.last, prog_bar=True, batch_size=1)

    def validation_step(self, item: str, batch_idx: int) -> None:
        """Log val_loss and its kin for callbacks of Lightning; measured once after each step."""
        if self.trainer.sanity_checking:
            return
        run, measured = self.run, self.readings.validation
        is_new = measured is None or measured[0] != run.state.step
        if is_new and not self.readings.stop:
            best = validate(run, self.readings, self._preemption.asked)
            if best is not None or self.readings.stop:
                save(run, self.readings, best)
            self.trainer.should_stop |= self._is_over()
            measured = self.readings.validation
        figures = {} if measured is None else asdict(measured[1])
        for name in ("loss", "perplexity", "bits_per_byte") if figures else ():
            self.log(f"val_{name}", figures[name], batch_size=1, sync_dist=True)

    def on_train_end(self) -> None:
        """Save where Lightning's limits ended the run, and end what goes on beside the steps."""
        state, limited = self.run.state, self.run.state.step < self.run.steps
        if limited and not self.readings.stop and state.step > self.run.begun_at:
            save(self.run, self.readings)
        end(self.run)
        self._started.close()
        if self._opens and self.run.runtime.is_main:
            self.run.show_picture(draw_loss(self.run.folder, self.run.reporter.warning))

    def teardown(self, stage: str) -> None:
        """Close the run, if it was opened here."""
        self._opened.close()

    def close_after(self, error: BaseException) -> None:
        """Close what is open, because of an error."""
        given = type(error), error, error.__traceback__
        self._started.__exit__(*given)
        self._opened.__exit__(*given)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add to a checkpoint of Lightning's what a run has beside tensors."""
        self.readings.drain()
        checkpoint["dtt"] = {**asdict(self.run.state), "corpus": self.run.corpora.name}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint of Lightning's (`ckpt_path`), wherever the run's folder was."""
        found, run = checkpoint.get("dtt"), self.run
        if found is None or found["corpus"] != run.corpora.name:
            raise CheckpointError(
                f"{self.trainer.ckpt_path} is no checkpoint of a DttModule on this text",
                "leave ckpt_path out: the run's folder is what it continues from",
            )
        run.state.step, run.begun_at = found["step"], found["step"]
        run.state.best_loss, run.state.tokens = found["best_loss"], found["tokens"]
        if run.metrics is not None:
            run.metrics.close()
            run.metrics = MetricsFile(run.folder / "metrics.jsonl", run.state.step)


class _Closing(Callback):
    """Tells a module of an error, of which Lightning tells callbacks only."""

    def on_exception(self, trainer: Trainer, module: Any, error: BaseException) -> None:
        module.close_after(error)


def _runtime(trainer: Trainer) -> Runtime:
    """Return this rank as Lightning has placed it."""
    ranks, local = trainer.world_size, trainer.num_devices
    launcher = "none" if ranks == 1 else "Lightning"
    place = Place(trainer.global_rank, ranks, trainer.local_rank, local, launcher)
    return Runtime(place, trainer.strategy.root_device)


def _refuse_trainer(trainer: Trainer, config: Config) -> None:
    """Raise ConfigError for a Trainer that would train another model than the configuration's."""
    device, asked = trainer.strategy.root_device.type, config.training.device
    wrong = {
        "strategy": type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy),
        "precision": trainer.precision != "32-true",
        "gradient_clip_val": trainer.gradient_clip_val is not None,
        "accelerator": asked not in ("auto", device),
    }
    says = {
        "strategy": "dtt trains with one device or with strategy='ddp'",
        "precision": "training.precision of the configuration holds; leave precision out",
        "gradient_clip_val": "training.grad_clip of the configuration holds; leave it out",
        "accelerator": f"training.device is {asked}: set it to auto, or another accelerator",
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ConfigError(f"the Trainer's {name} does not go with a DttModule", says[name])
