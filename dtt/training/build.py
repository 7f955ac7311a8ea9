"""A model, its optimizer and the step, as a configuration and a layout want them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from dtt.config.schema import Config
from dtt.data.order import mix
from dtt.dist import Runtime, local
from dtt.model.decoder import Decoder
from dtt.model.objective import Objective
from dtt.optim.build import build_optimizer
from dtt.parallel.apply import parallelize
from dtt.parallel.layout import Layout
from dtt.parallel.part import Part
from dtt.training.batching import divide
from dtt.training.saved import Saved
from dtt.training.step import Stepper


def build_model(config: Config, runtime: Runtime, dtype: torch.dtype) -> Decoder:
    """The initial weights depend on the seed alone: they are drawn on the CPU."""
    model = Decoder(config.model)
    model.init_weights(torch.Generator().manual_seed(mix(config.seed, 0) >> 1))
    model.compute_in(dtype)
    model.recompute_blocks = config.training.gradient_checkpointing
    return model.to(runtime.device)


def build_stepper(
    objective: Objective, layout: Layout, config: Config, runtime: Runtime, dtype: torch.dtype
) -> Stepper:
    division = divide(config.training, layout.data)
    model = parallelize(
        objective, layout, config, runtime, dtype, division.rows, division.accumulation
    )
    return Stepper(
        model=model,
        optimizer=build_optimizer(
            config.optimizer, model.named_parameters().items(), shares=model.shares()
        ),
        runtime=runtime,
        division=division,
        seed=config.seed,
        grad_clip=config.training.grad_clip,
        scaler=torch.amp.GradScaler(runtime.device.type, enabled=dtype == torch.float16),
    )


class Reader(Protocol):
    """Whole tensors, of which parts can be read."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, part: Part) -> torch.Tensor: ...


@dataclass(frozen=True)
class SavedGroup:
    """The tensors of one group of a checkpoint."""

    saved: Saved
    group: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.saved.shapes(self.group)

    def read(self, name: str, part: Part) -> torch.Tensor:
        return self.saved.part(self.group, name, part)


def take_over(stepper: Stepper, weights: Reader, state: Reader) -> None:
    """Go on from weights and an optimizer state; of each, only this rank's part is read."""
    model = stepper.model
    for name, owner in model.state().items():
        local(owner).copy_(weights.read(name, model.part(name, owner)))
    stepper.optimizer.load_named_state(
        {
            name: model.like(owner, state.read(name, part))
            for name, owner, part in model.parts_of_state(state.shapes())
        }
    )
