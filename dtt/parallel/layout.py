"""Which rank does what: the axes of a layout, the arithmetic that they must obey.

Needs no torch, so that a layout that cannot be is refused before anything is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dtt.config.parallel import AXES, REST, Parallel
from dtt.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis; they multiply to `ranks`."""

    replicate: int = 1
    shard: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """The axes' sizes in the order of AXES, outermost first."""
        return tuple(getattr(self, name) for name in AXES)

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes)

    def __str__(self) -> str:
        """The axes that have more than one rank."""
        named = [f"{n} {size}" for n, size in zip(AXES, self.sizes, strict=True) if size > 1]
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
                f"parallel: {product} does not divide the {ranks} ranks",
                f"use a multiple of {taken} ranks, or another layout",
            )
        asked[rest] = ranks // taken
    elif taken != ranks:
        raise ConfigError(
            f"parallel: {product or 'one rank'} is {taken} ranks, and there are {ranks}",
            "set one axis to -1, which takes the ranks that are left",
        )
    return Layout(**asked)
