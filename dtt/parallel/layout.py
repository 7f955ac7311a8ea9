"""Which rank does what: the axes of a layout, the arithmetic that they must obey.

Needs no torch, so that a layout that cannot be is refused before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dtt.config.model import AnyModel, HfModel, Model
from dtt.config.parallel import AXES, DATA_AXES, REST, Parallel
from dtt.errors import ConfigError

STAGES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero-bubble": 2}
"""Stages of each rank by schedule."""


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis; they multiply to `ranks`."""

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1
    pipeline: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """The axes' sizes in the order of AXES, outermost first."""
        return tuple(getattr(self, name) for name in AXES)

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes)

    @property
    def data(self) -> int:
        """Number of ranks that have different sequences."""
        return math.prod(getattr(self, name) for name in DATA_AXES)

    @property
    def is_plain(self) -> bool:
        """Whether every rank has the whole model."""
        return self.ranks == self.replicate

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return where a rank is on each axis."""
        found: dict[str, int] = {}
        for name, size in reversed(list(zip(AXES, self.sizes, strict=True))):
            rank, found[name] = divmod(rank, size)
        return found

    def data_rank(self, rank: int) -> int:
        """Return which share of the sequences a rank has, below `data`."""
        place, index = self.coordinates(rank), 0
        for name in DATA_AXES:
            index = index * getattr(self, name) + place[name]
        return index

    def __str__(self) -> str:
        """The axes that have more than one rank."""
        named = [f"{n} {size}" for n, size in zip(AXES, self.sizes, strict=True) if size > 1]
        return " x ".join(named) or "one rank"


def resolve(settings: Parallel, model: AnyModel, ranks: int) -> Layout:
    """Return the layout of so many ranks; ConfigError with the arithmetic if there is none, or the
    model cannot be divided so."""
    asked = {name: getattr(settings, name) for name in AXES}
    if asked["replicate"] is None:
        asked["replicate"] = 1 if REST in asked.values() else REST
    taken = math.prod(size for size in asked.values() if size != REST)
    product = " x ".join(f"{n} {size}" for n, size in asked.items() if size not in (REST, 1))
    rest = next((name for name, size in asked.items() if size == REST), None)
    if rest is not None:
        if ranks % taken:
            those = "1 rank" if ranks == 1 else f"the {ranks} ranks"
            raise ConfigError(
                f"parallel: {product} does not divide {those}",
                f"use a multiple of {taken} ranks (--world-size), or another layout",
            )
        asked[rest] = ranks // taken
    elif taken != ranks:
        raise ConfigError(
            f"parallel: {product or 'one rank'} is {taken} ranks, and there are {ranks}",
            "set one axis to -1, which takes the ranks that are left, or change --world-size",
        )
    layout = Layout(**asked)
    if settings.offload and layout.shard == 1:
        raise ConfigError(
            "parallel.offload moves what parallel.shard has divided, and shard is 1",
            "set parallel.shard, or parallel.offload to false",
        )
    if isinstance(model, HfModel):
        _refuse_for_transformers(layout, model)
    else:
        _refuse_for_decoder(layout, settings, model)
    return layout


def _refuse_for_transformers(layout: Layout, model: HfModel) -> None:
    """Raise ConfigError for a layout that a model of `transformers` does not go along."""
    for name in ("context", "expert", "pipeline"):
        size = getattr(layout, name)
        if size > 1:
            raise ConfigError(
                f"parallel.{name} is {size}, and divides dtt's own decoder only, not a model of "
                "transformers",
                "use parallel.replicate, shard and tensor, or model.name decoder",
            )
    if layout.tensor > 1 and model.dropout:
        raise ConfigError(
            "model.dropout does not go with parallel.tensor in a model of transformers: each rank "
            "would drop the same places of its heads",
            "set model.dropout to 0, or use parallel.shard",
        )


def _refuse_for_decoder(layout: Layout, settings: Parallel, model: Model) -> None:
    """Raise ConfigError, with the arithmetic, if the model cannot be divided so."""
    for what, number, by, size in _divisions(layout, settings, model):
        if number % size:
            raise ConfigError(
                f"{what} ({number}) is not divisible by {by} ({size})",
                f"the layout is {layout}: change one of the two",
            )
    if layout.expert > 1 and model.experts is None:
        raise ConfigError(
            f"parallel.expert is {layout.expert}, and the model has no experts",
            "set model.experts, or parallel.expert to 1",
        )
    alone = layout.ranks == layout.pipeline
    if settings.schedule == "zero-bubble" and layout.pipeline > 1 and not alone:
        raise ConfigError(
            f"parallel.schedule zero-bubble goes with a pipeline alone, not with {layout}",
            "use 1f1b or interleaved, or no other axis",
        )
    if layout.pipeline > 1 and model.tied_head:
        raise ConfigError(
            "model.tied_head: a pipeline parts the embedding from the head that it is",
            "set model.tied_head to false, or parallel.pipeline to 1",
        )


def _divisions(
    layout: Layout, settings: Parallel, model: Model
) -> Iterator[tuple[str, int, str, int]]:
    """Yield what must be divisible, by what."""
    tensor, by = layout.tensor, "parallel.tensor"
    yield "model.heads", model.heads, by, tensor
    yield "model.kv_heads", model.kv_heads or model.heads, by, tensor
    if model.experts is None or model.experts.every > 1:
        yield "the width of the MLP", model.mlp_width, by, tensor
    if model.experts is not None:
        yield "model.experts.number", model.experts.number, "parallel.expert", layout.expert
    halves = 2 * layout.context if layout.context > 1 else 1
    yield "model.context", model.context, "2 x parallel.context x parallel.tensor", halves * tensor
    stages = layout.pipeline * (STAGES[settings.schedule] if layout.pipeline > 1 else 1)
    yield "model.layers", model.layers, "the pipeline's stages", stages
