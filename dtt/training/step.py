"""One optimizer step: forwards, backwards, clipping, update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dtt.data.loader import Batch
from dtt.data.order import mix
from dtt.dist import Runtime
from dtt.model.dropout import sample_keys
from dtt.optim.build import Optimizers, clip_gradients
from dtt.parallel.model import ParallelModel
from dtt.training.batching import Division


@dataclass(frozen=True)
class StepResult:
    """On the device, summed over ranks: nothing here makes the host wait."""

    totals: Tensor
    """[loss in nats, ranks that want to stop, what was seen], fp64 where the device has it."""
    grad_norm: Tensor
    """Before clipping, 0-dim."""
    tokens: int
    """Target tokens of the step over all ranks."""
    seen: int | None = None
    """The step's number in the ledger, where one rank knows it without the sum."""


def _never() -> bool:
    return False


@dataclass
class Stepper:
    """What a step needs beside the batch; `scaler` only with fp16."""

    model: ParallelModel
    optimizer: Optimizers
    runtime: Runtime
    division: Division
    seed: int
    grad_clip: float | None
    scaler: torch.amp.GradScaler

    def __post_init__(self) -> None:
        self.parameters = list(self.model.named_parameters().values())
        # GradScaler asks for param_groups and step only, which Optimizers has.
        self._torch_optimizer = cast(torch.optim.Optimizer, self.optimizer)

    def step(self, batch: Batch, step: int, stop: Callable[[], bool] = _never) -> StepResult:
        """Train on this rank's share of step `step` (0-based); `update` applies it.

        The gradient is that of (sum of losses) / (all target tokens of the step), however the
        batch is divided; dropout is a function of the step and of samples' numbers in it. `stop`,
        whether this rank was asked to stop, is called as late as possible: before ranks add up.
        """
        tokens, given = self.inputs(batch, step)
        scale: Tensor | float = 1 / batch.count
        if self.scaler.is_enabled():
            scale = self.scaler.scale(torch.tensor(scale, device=tokens.device))
        loss = self.model.train(tokens, given, scale, self.division.accumulation)
        return self.finish(batch, loss, stop)

    def inputs(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the tokens of step `step` and what else an Objective takes, on the device."""
        device = self.runtime.device
        given = {"targets": batch.targets.to(device, non_blocking=True)}
        if batch.positions is not None:
            given["positions"] = batch.positions.to(device, non_blocking=True)
        if self.model.settings.dropout:
            # A rank has a contiguous share of the step (dtt.data.loader).
            first = self.model.data_rank * self.division.rows
            samples = range(first, first + self.division.rows)
            given["keys"] = sample_keys(mix(self.seed, 3, step), samples, device)
        return batch.tokens.to(device, non_blocking=True), given

    def finish(self, batch: Batch, loss: Tensor, stop: Callable[[], bool] = _never) -> StepResult:
        """Clip the gradients of a step that had this loss; return its figures over all ranks."""
        self.scaler.unscale_(self._torch_optimizer)
        norm = self._clip()
        seen = batch.seen if self.model.counts_data else 0
        others = torch.tensor([stop(), seen], dtype=loss.dtype)
        others = others.to(self.runtime.device, non_blocking=True)
        totals = self.runtime.sum(torch.cat([loss.view(1), others]))
        return StepResult(
            totals, norm, batch.count, batch.seen if self.runtime.ranks == 1 else None
        )

    def _clip(self) -> Tensor:
        """Bound the norm of the gradient; return what it was."""
        norm = None if self.model.is_whole else self.model.gradient_norm()
        return clip_gradients(self.parameters, self.grad_clip, norm)

    def update(self, factor: float) -> None:
        """Apply the gradients with the peak learning rate times `factor`, and balance experts."""
        self.optimizer.set_lr(factor)
        self.scaler.step(self._torch_optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.model.rebalance()
