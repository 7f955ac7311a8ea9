"""Which rank does what: the axes of a layout, the arithmetic that they must obey.

Needs no torch, so that a layout that cannot be is refused before anything is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dtt.config.model import Model
from dtt.config.parallel import AXES, REST, Parallel
from dtt.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis; they multiply to `ranks`."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """The axes' sizes in the order of AXES, outermost first."""
        return tuple(getattr(self, name) for name in AXES)

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes)

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that each train on sequences of their own."""
        return self.replicate * self.shard * self.expert

    @property
    def only_replicates(self) -> bool:
        """Whether every rank has the whole model and whole sequences (DDP)."""
        return self.ranks == self.replicate

    def place(self, rank: int) -> dict[str, int]:
        """Return a rank's coordinate along each axis."""
        coordinates: dict[str, int] = {}
        for name, size in zip(reversed(AXES), reversed(self.sizes), strict=True):
            rank, coordinates[name] = divmod(rank, size)
        return coordinates

    def data_rank(self, rank: int) -> int:
        """Return which sequences a rank trains on, in [0, data_ranks)."""
        at = self.place(rank)
        return (at["replicate"] * self.shard + at["shard"]) * self.expert + at["expert"]

    def __str__(self) -> str:
        named = [f"{name} {size}" for name, size in zip(AXES, self.sizes, strict=True) if size > 1]
        return " x ".join(named) or "one rank"


def resolve(settings: Parallel, ranks: int) -> Layout:
    """Return the layout of so many ranks; ConfigError with the arithmetic if there is none."""
    asked = {name: getattr(settings, name) for name in AXES}
    if asked["replicate"] is None:
        asked["replicate"] = 1 if REST in asked.values() else REST
    taken = math.prod(size for size in asked.values() if size != REST)
    product = " x ".join(f"{n} {size}" for n, size in asked.items() if size not in (REST, 1))
    rest = next((name for name, size in asked.items() if size == REST), None)
    if rest is not None:
        if ranks % taken:
            raise ConfigError(
                f"parallel: {product} = {taken} does not divide the {ranks} ranks",
                f"use a multiple of {taken} ranks, or another layout",
            )
        asked[rest] = ranks // taken
    elif taken != ranks:
        raise ConfigError(
            f"parallel: {product or 'every axis 1'} makes {taken} ranks, and there are {ranks}",
            "set one axis to -1, which takes the ranks that are left",
        )
    return Layout(**asked)


def refuse_misfit(layout: Layout, model: Model) -> None:
    """Raise ConfigError if a model cannot be divided as the layout says."""
    kv_heads = model.kv_heads or model.heads
    pieces = 2 * layout.context * layout.tensor if layout.context > 1 else layout.tensor
    for axis, size, number, what in (
        ("tensor", layout.tensor, model.heads, "model.heads"),
        ("tensor", layout.tensor, kv_heads, "model.kv_heads"),
        ("pipeline", layout.pipeline, model.layers, "model.layers"),
        ("context", pieces, model.context, "model.context"),
    ):
        if number % size:
            rule = f"2 x context {layout.context} x tensor {layout.tensor} = {size}"
            divisor = rule if axis == "context" and layout.context > 1 else f"{axis} {size}"
            raise ConfigError(
                f"{what} ({number}) is not divisible by parallel: {divisor}",
                f"change {what} or parallel.{axis}",
            )
    if layout.pipeline > 1 and model.tied_head:
        raise ConfigError(
            f"parallel.pipeline {layout.pipeline} puts the embedding on the first stage and the "
            "head on the last, and model.tied_head makes them one matrix",
            "set model.tied_head to false, or parallel.pipeline to 1",
        )
