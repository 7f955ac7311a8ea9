"""Which tensors of a folder make up which of ours, and how they lie in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from dtt.config.model import Model
from dtt.huggingface.families import Family
from dtt.parallel.part import Part

BLOCK = re.compile(r"^blocks\.(\d+)\.")


@dataclass(frozen=True)
class Piece:
    """A tensor of a folder, which is a part of one of ours."""

    name: str
    part: Part
    """Which elements of ours it has."""
    transposed: bool = False
    """Its two dims are ours in the other order."""
    stacked: bool = False
    """It lacks our first dim, which counts experts."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its own shape."""
        shape = self.part.local_shape[1:] if self.stacked else self.part.local_shape
        return shape[::-1] if self.transposed else shape

    def from_ours(self, part: Tensor) -> Tensor:
        """Return it, given its part of our tensor."""
        tensor = part[0] if self.stacked else part
        return tensor.t() if self.transposed else tensor


def whole(name: str, shape: tuple[int, ...]) -> list[Piece]:
    """Return the one piece of a folder that has our own names."""
    return [Piece(name, Part.all_of(shape))]


def pieces(family: Family, model: Model, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """Return the pieces of our tensor `name`. KeyError: the family has no such tensor."""
    found = BLOCK.match(name)
    block = found[1] if found else ""
    key = BLOCK.sub("blocks.{n}.", name)
    suffix = ""
    if key not in family.names:
        key, _, kind = key.rpartition(".")
        suffix = f".{kind}"
    names = [one.replace("{n}", block) + suffix for one in family.names[key]]
    if "{e}" in names[0]:
        return [
            Piece(names[0].replace("{e}", str(index)), _rows(shape, index, index + 1), stacked=True)
            for index in range(shape[0])
        ]
    if len(names) == 1:
        transposed = family.transposed and bool(block) and len(shape) == 2
        return [Piece(names[0], Part.all_of(shape), transposed)]
    width = model.head_dim or model.dim // model.heads
    heads = (model.heads, *[model.kv_heads or model.heads] * 2)
    made, start = [], 0
    for one, count in zip(names, heads, strict=True):
        made.append(Piece(one, _rows(shape, start, start + count * width)))
        start += count * width
    return made


def zero_biases(
    family: Family, model: Model, shapes: dict[str, tuple[int, ...]]
) -> Iterator[Piece]:
    """Yield the biases that the family has and the model, whose tensors are `shapes`, has not."""
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        bias = f"{module}.bias"
        if kind == "weight" and bias not in shapes and module.split(".")[-1] in family.biased:
            yield from pieces(family, model, bias, shape[:1])


def _rows(shape: tuple[int, ...], start: int, stop: int) -> Part:
    return Part.all_of(shape).narrow(0, start, stop)
