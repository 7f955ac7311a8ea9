"""Settings of parallelism: how the ranks share the work."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dtt.config.section import Section

REST = -1
AXES = ("pipeline", "expert", "replicate", "context", "shard", "tensor")
"""From the outermost to the innermost: ranks that differ in the last one only are neighbours."""
DATA_AXES = ("expert", "replicate", "shard")
"""Axes whose ranks have different sequences."""

Axis = Annotated[int, Field(ge=REST)]


class Parallel(Section):
    """How the ranks share the work; the numbers of ranks along the axes multiply to all of them."""

    world_size: int = Field(1, gt=0)
    """Workers to start on this machine; under torchrun, Slurm or MPI their number holds instead."""
    restarts: int = Field(3, ge=0)
    """How often workers that were lost (killed, or their node) are started again from the last
    checkpoint; a new checkpoint makes the count begin anew. 0: never, the run ends at the first."""
    replicate: Axis | None = None
    """Ranks with copies of what the others have divided; null: those that no other axis takes."""
    shard: Axis = 1
    """Ranks that divide parameters, gradients and optimizer state (FSDP2); -1: those left."""
    reshard: bool = True
    """With shard: give a block's parameters up after its forward, and gather them again for its
    backward; false needs more memory and less communication."""
    offload: bool = False
    """With shard: keep divided parameters, gradients and optimizer state in CPU memory, where the
    optimizer then works; a block's parameters come to the GPU when they are needed."""
    tensor: Axis = 1
    """Ranks that divide matrix products (in dtt's decoder the tokens between them, too); -1: those
    left."""
    context: Axis = 1
    """Ranks that divide every sequence, for long contexts; -1: those left."""
    expert: Axis = 1
    """Ranks that divide the experts of a mixture, and otherwise are replicas; -1: those left."""
    pipeline: Axis = 1
    """Ranks that divide the blocks; -1: those left."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble"] = "1f1b"
    """With pipeline: the order of forwards and backwards; interleaved and zero-bubble give each
    rank two stages."""

    rendezvous_timeout: float = Field(300.0, gt=0)
    """Seconds for all ranks to come together at the start; then those that came name the others."""

    @model_validator(mode="after")
    def _axes_fit(self) -> Parallel:
        given = {name: getattr(self, name) for name in AXES}
        if zeros := [name for name, value in given.items() if value == 0]:
            raise ValueError(f"{zeros[0]} is 0: give a number of ranks, or -1 for those left")
        rest = [name for name, value in given.items() if value == REST]
        if len(rest) > 1:
            raise ValueError(f"{' and '.join(rest)} are both -1: only one can take what is left")
        return self
