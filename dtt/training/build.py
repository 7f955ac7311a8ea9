"""A model, its optimizer and the step, as a configuration and a layout want them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from dtt.config.schema import Config
from dtt.dist import Runtime
from dtt.model.decoder import Decoder
from dtt.model.fp8 import use_fp8
from dtt.model.kinds import empty_model
from dtt.model.language_model import Initial, LanguageModel
from dtt.model.objective import Objective
from dtt.optim.build import build_optimizer
from dtt.parallel.apply import parallelize
from dtt.parallel.layout import Layout
from dtt.parallel.model import Reader
from dtt.parallel.part import Part
from dtt.training.batching import divide
from dtt.training.step import Stepper


def build_model(config: Config, dtype: torch.dtype) -> LanguageModel:
    """Return the model that computes in `dtype`, on the meta device: without memory."""
    model = empty_model(config.model)
    model.compute_in(dtype)
    settings = config.training
    if settings.gradient_checkpointing:
        model.recompute_blocks(settings.recompute == "selective", settings.recompute_every)
    if settings.fp8 and isinstance(model, Decoder):
        use_fp8(model.blocks)
    return model


def build_stepper(
    model: LanguageModel,
    layout: Layout,
    config: Config,
    runtime: Runtime,
    dtype: torch.dtype,
    weights: Reader | None = None,
) -> Stepper:
    """Return what trains the model of `build_model`, from `weights`, or initial ones."""
    division = divide(config.training, layout.data, layout.pipeline)
    parallel = parallelize(
        Objective(model),
        layout,
        config,
        runtime,
        division.rows,
        division.accumulation,
        weights or InitialWeights(model.initial(config.seed)),
    )
    optimizer = build_optimizer(
        config.optimizer,
        parallel.named_parameters().items(),
        model.block_prefix,
        parallel.shares(),
    )
    return Stepper(
        model=parallel,
        optimizer=optimizer,
        runtime=runtime,
        division=division,
        seed=config.seed,
        grad_clip=config.training.grad_clip,
        scaler=torch.amp.GradScaler(runtime.device.type, enabled=dtype == torch.float16),
    )


@dataclass(frozen=True)
class InitialWeights:
    """The weights that a run begins with."""

    initial: Initial

    def read(self, name: str, part: Part) -> torch.Tensor:
        return part.take(self.initial(name, part.shape))


class NamedReader(Reader, Protocol):
    """A Reader that knows what there is."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the whole tensors by name."""


def load_optimizer(stepper: Stepper, state: NamedReader) -> None:
    """Take over an optimizer's state, by name; of it only this rank's parts are read."""
    model = stepper.model
    stepper.optimizer.load_named_state(
        {
            name: model.like(owner, state.read(name, part))
            for name, owner, part in model.parts_of_state(state.shapes())
        }
    )
