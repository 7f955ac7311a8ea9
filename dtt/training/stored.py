"""Tensors in the files of a checkpoint: whole, or in the parts that ranks had of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dtt.parallel.part import Part, Range

PARTS = "parts"
"""The key in a file's metadata that says which parts its tensors are: {name: [shape, ranges]}."""


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of one group, in one file or in one file per rank."""

    files: list[Any]
    """Open safetensors files."""

    @cached_property
    def places(self) -> dict[str, list[tuple[Any, Part | None]]]:
        """By name which files have what of a tensor; None: all of it."""
        found: dict[str, list[tuple[Any, Part | None]]] = {}
        for file in self.files:
            parts = json.loads((file.metadata() or {}).get(PARTS, "{}"))
            for name in file.offset_keys():  # in the order in which they lie there
                part = Part(tuple(parts[name][0]), _ranges(parts[name][1])) if parts else None
                found.setdefault(name, []).append((file, part))
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the whole tensors, without reading them."""
        return {
            name: tuple(file.get_slice(name).get_shape()) if part is None else part.shape
            for name, places in self.places.items()
            for file, part in places[:1]
        }

    def whole(self) -> dict[str, Tensor]:
        """Return all tensors whole; KeyError for one of which a part is in no file."""
        found: dict[str, Tensor] = {}
        for name, places in self.places.items():
            file, part = places[0]
            if part is None:
                found[name] = file.get_tensor(name)
            else:
                found[name] = _read(name, Part.all_of(part.shape), places)
        return found

    def part(self, name: str, wanted: Part) -> Tensor:
        """Read a part of a tensor, and no other; KeyError if it is in no file."""
        return _read(name, wanted, self.places[name])


def _ranges(rows: list[list[list[int]]]) -> tuple[tuple[Range, ...], ...]:
    return tuple(tuple((a, b) for a, b in row) for row in rows)


def _read(name: str, wanted: Part, places: list[tuple[Any, Part | None]]) -> Tensor:
    found, missing = None, 0
    for file, part in places:
        stored = file.get_slice(name)
        part = part or Part.all_of(tuple(stored.get_shape()))
        for here, there in shared_blocks(wanted, part):
            block = stored[there] if there else file.get_tensor(name)
            if found is None:
                found = torch.empty(wanted.local_shape, dtype=block.dtype)
                missing = found.numel()
            found[here] = block
            missing -= block.numel()
    if found is None and 0 in wanted.local_shape:
        nothing: Tensor = stored[(slice(0, 0),) * len(wanted.shape)]  # of the tensor's type
        return nothing.new_empty(wanted.local_shape)
    if found is None or missing:
        raise KeyError(name)
    return found


def shared_blocks(
    wanted: Part, stored: Part
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Yield the blocks that two parts share: where each is in the one, and in the other."""
    steps = []
    for one, other in zip(wanted.ranges, stored.ranges, strict=True):
        steps.append(
            [
                (_moved(first, last, a, before), _moved(first, last, c, behind))
                for (a, b), before in _offsets(one)
                for (c, d), behind in _offsets(other)
                if (first := max(a, c)) < (last := min(b, d))
            ]
        )
    for places in itertools.product(*steps):
        yield tuple(here for here, _ in places), tuple(there for _, there in places)


def _offsets(ranges: tuple[Range, ...]) -> Iterator[tuple[Range, int]]:
    before = 0
    for a, b in ranges:
        yield (a, b), before
        before += b - a


def _moved(first: int, last: int, start: int, before: int) -> slice:
    return slice(first - start + before, last - start + before)
