"""Settings of parallelism: how the ranks share the work."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from dtt.config.section import Section

REST = -1
AXES = ("replicate", "shard")
"""From the outermost to the innermost: ranks that differ in the last one only are neighbours."""

Axis = Annotated[int, Field(ge=REST)]


class Parallel(Section):
    """How the ranks share the work; the numbers of ranks along the axes multiply to all of them."""

    world_size: int = Field(1, gt=0)
    """Workers to start on this machine; under torchrun, Slurm or MPI their number holds instead."""
    replicate: Axis | None = None
    """Ranks with copies of what `shard` has divided; null: those that no other axis takes."""
    shard: Axis = 1
    """Ranks that divide parameters, gradients and optimizer state (FSDP2); -1: those left."""
    reshard: bool = True
    """With shard: give a block's parameters up after its forward, and gather them again for its
    backward; false needs more memory and less communication."""

    @model_validator(mode="after")
    def _axes_fit(self) -> Parallel:
        given = {name: getattr(self, name) for name in AXES}
        if zeros := [name for name, value in given.items() if value == 0]:
            raise ValueError(f"{zeros[0]} is 0: give a number of ranks, or -1 for those left")
        rest = [name for name, value in given.items() if value == REST]
        if len(rest) > 1:
            raise ValueError(f"{' and '.join(rest)} are both -1: only one can take what is left")
        return self
