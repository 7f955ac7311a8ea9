"""The process groups of a layout, made when they are first asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from dtt.config.parallel import AXES
from dtt.dist import Runtime
from dtt.parallel.layout import Layout


@dataclass
class Mesh:
    """A rank's place in its layout. All ranks must ask for the same groups in the same order."""

    layout: Layout
    runtime: Runtime
    _groups: dict[tuple[str, ...], ProcessGroup] = field(default_factory=dict)

    @cached_property
    def place(self) -> dict[str, int]:
        """This rank's coordinate on each axis."""
        return self.layout.coordinates(self.runtime.rank)

    def size(self, *axes: str) -> int:
        """Return the number of ranks that differ from this one on these axes only, and itself."""
        found = 1
        for name in axes:
            found *= getattr(self.layout, name)
        return found

    def is_first(self, *axes: str) -> bool:
        """Whether this rank is the first along each of the axes."""
        return not any(self.place[name] for name in axes)

    def group(self, *axes: str) -> ProcessGroup:
        """Return the group of the ranks that differ from this one on these axes only."""
        if axes not in self._groups:
            ranks = torch.arange(self.layout.ranks).view(self.layout.sizes)
            inner = [AXES.index(name) for name in axes]
            outer = [dim for dim in range(len(AXES)) if dim not in inner]
            mine = None
            for members in ranks.permute(*outer, *inner).reshape(-1, self.size(*axes)).tolist():
                made = dist.new_group(members)
                if self.runtime.rank in members:
                    mine = made
            assert isinstance(mine, ProcessGroup)
            self._groups[axes] = mine
        return self._groups[axes]

    def device_mesh(self, copies: tuple[str, ...]) -> DeviceMesh:
        """Return the mesh for `fully_shard`: ranks with copies x ranks that divide (shard)."""
        kind = self.runtime.device.type
        shard = self.group("shard")
        if self.size(*copies) == 1:
            return DeviceMesh.from_group(shard, kind, mesh_dim_names=("shard",))
        sizes = [getattr(self.layout, name) for name in AXES]
        ranks = torch.arange(self.layout.ranks).view(sizes)
        index = tuple(
            slice(None) if name in (*copies, "shard") else self.place[name] for name in AXES
        )
        inner = [name for name in AXES if name in (*copies, "shard")]
        found = ranks[index].permute(*(inner.index(name) for name in copies), inner.index("shard"))
        return DeviceMesh.from_group(
            [self.group(*copies), shard],
            kind,
            found.reshape(-1, self.layout.shard),
            mesh_dim_names=("copies", "shard"),
        )
