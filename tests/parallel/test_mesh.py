"""The groups of a mesh, in one process that plays each rank in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dtt.config.parallel import AXES
from dtt.dist import Place, Runtime
from dtt.parallel.layout import Layout
from dtt.parallel.mesh import Mesh

LAYOUTS = (
    Layout(pipeline=2, shard=2, tensor=2),
    Layout(expert=2, replicate=2, shard=3),
    Layout(replicate=2, context=2, tensor=2),
)
AXES_OF_GROUPS = (*((name,) for name in AXES), ("context", "tensor"), AXES[1:])


@contextmanager
def as_rank(layout: Layout, rank: int) -> Iterator[Mesh]:
    """A rank whose collectives do nothing."""
    ranks = layout.ranks
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield Mesh(layout, Runtime(Place(rank, ranks, rank, ranks, "test"), torch.device("cpu")))
    finally:
        dist.destroy_process_group()


def alike(layout: Layout, rank: int, axes: tuple[str, ...]) -> list[int]:
    """The ranks that differ from one on these axes only."""
    mine = layout.coordinates(rank)
    return [
        other
        for other in range(layout.ranks)
        if all(layout.coordinates(other)[n] == mine[n] for n in AXES if n not in axes)
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_group_has_the_ranks_that_differ_on_its_axes_only(layout: Layout) -> None:
    for rank in range(layout.ranks):
        with as_rank(layout, rank) as mesh:
            for axes in AXES_OF_GROUPS:
                group, expected = mesh.group(*axes), alike(layout, rank, axes)
                assert dist.get_process_group_ranks(group) == expected
                assert group.size() == mesh.size(*axes) == len(expected)
                assert mesh.is_first(*axes) == (rank == expected[0]) == (group.rank() == 0)
                assert mesh.group(*axes) is group
                if len(axes) == 1:
                    assert group.rank() == mesh.place[axes[0]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("copies", [("expert", "replicate", "context"), ("replicate", "context")])
def test_a_device_mesh_has_copies_by_shares(layout: Layout, copies: tuple[str, ...]) -> None:
    for rank in range(layout.ranks):
        with as_rank(layout, rank) as mesh:
            found = mesh.device_mesh(copies)
            place, ranks = mesh.place, alike(layout, rank, (*copies, "shard"))
            assert sorted(found.mesh.flatten().tolist()) == ranks
            if mesh.size(*copies) == 1:
                assert found.mesh.tolist() == ranks and found.mesh_dim_names == ("shard",)
                continue
            assert found.mesh.shape == (mesh.size(*copies), layout.shard)
            row, column = (found.mesh == rank).nonzero()[0].tolist()
            assert column == place["shard"] and found.mesh_dim_names == ("copies", "shard")
            assert found.mesh[row].tolist() == alike(layout, rank, ("shard",))
            assert found.mesh[:, column].tolist() == alike(layout, rank, copies)
            groups = found.get_group("copies"), found.get_group("shard")
            assert groups == (mesh.group(*copies), mesh.group("shard"))
