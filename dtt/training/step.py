"""One optimizer step: forwards, backwards, clipping, update."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtt.data.loader import Batch
from dtt.data.order import mix
from dtt.dist import Runtime
from dtt.optim.build import Optimizers, clip_gradients
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


@dataclass
class Stepper:
    """What a step needs beside the batch; `scaler` only with fp16."""

    objective: nn.Module
    optimizer: Optimizers
    runtime: Runtime
    division: Division
    seed: int
    grad_clip: float | None
    scaler: torch.amp.GradScaler

    def __post_init__(self) -> None:
        self.parameters = list(self.objective.parameters())
        # GradScaler asks for param_groups and step only, which Optimizers has.
        self._torch_optimizer = cast(torch.optim.Optimizer, self.optimizer)

    def step(self, batch: Batch, step: int, stop: bool) -> StepResult:
        """Train on this rank's share of step `step` (0-based); `update` applies it.

        The gradient is that of (sum of losses) / (all target tokens of the step), however the
        batch is divided.
        """
        device, micro = self.runtime.device, self.division.micro_batch_size
        tokens = batch.tokens.to(device, non_blocking=True)
        targets = batch.targets.to(device, non_blocking=True)
        positions = batch.positions
        if positions is not None:
            positions = positions.to(device, non_blocking=True)
        replicated = isinstance(self.objective, DistributedDataParallel)
        # DDP averages over ranks, so each rank's share is scaled up by their number; others add up.
        scale = (self.runtime.ranks if replicated else 1) / batch.count
        loss = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32)
        loss = loss.to(device)
        for index in range(self.division.accumulation):
            rows = slice(index * micro, (index + 1) * micro)
            # Dropout is a function of the step and the place in it, so resuming needs no state.
            place = self.runtime.rank * self.division.accumulation + index
            self._seed_dropout(mix(self.seed, 3, step, place) >> 1)
            with self._sync_only_last(index):
                places = None if positions is None else positions[rows]
                part = self.objective(tokens[rows], targets[rows], places)
                self.scaler.scale(part * scale).backward()
            loss += part.detach()
        self.scaler.unscale_(self._torch_optimizer)
        norm = clip_gradients(self.parameters, self.grad_clip)
        others = torch.tensor([stop, batch.seen], dtype=loss.dtype).to(device, non_blocking=True)
        totals = self.runtime.sum(torch.cat([loss.view(1), others]))
        return StepResult(
            totals, norm, batch.count, batch.seen if self.runtime.ranks == 1 else None
        )

    def _seed_dropout(self, seed: int) -> None:
        if self.runtime.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # 1 us; torch.manual_seed takes 67
        else:
            torch.manual_seed(seed)

    def update(self, factor: float) -> None:
        """Apply the gradients with the peak learning rate times `factor`."""
        self.optimizer.set_lr(factor)
        self.scaler.step(self._torch_optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def _sync_only_last(self, index: int) -> AbstractContextManager[None]:
        last = index == self.division.accumulation - 1
        if isinstance(self.objective, DistributedDataParallel) and not last:
            return self.objective.no_sync()
        return nullcontext()
