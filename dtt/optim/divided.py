"""Muon's orthogonalization where ranks divide the matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dtt.optim.muon import zeropower


@dataclass(frozen=True)
class Shares:
    """How the ranks of a group divide a matrix [M, N]."""

    group: ProcessGroup
    dim: int
    """0: by rows, 1: by columns."""
    sizes: tuple[int, ...]
    """Of each rank's share along that dim."""


def zeropower_divided(updates: Tensor, shares: tuple[Shares, ...], steps: int) -> Tensor:
    """Return `zeropower` of K matrices, of which each rank has `updates` [K, its rows, columns].

    Divided first as `shares` says last. Each matrix is gathered on one rank, in bfloat16, and only
    that one computes it: two exchanges for each group in all, where a DTensor in torch.optim.Muon
    would make fifteen for each matrix. Rows or columns of what is gathered may be in another order
    than the matrix has them, which a factor that is orthogonal does not mind.
    """
    if not shares:
        return zeropower(updates, steps)
    group, dim, sizes = shares[0].group, shares[0].dim + 1, shares[0].sizes
    ranks, me, count = dist.get_world_size(group), dist.get_rank(group), len(updates)
    owned = [len(range(rank, count, ranks)) for rank in range(ranks)]
    mine = updates.bfloat16()
    across = mine.shape[3 - dim]
    sent = torch.cat([mine[rank::ranks].reshape(-1) for rank in range(ranks)])
    sizes_out = [owned[rank] * sizes[me] * across for rank in range(ranks)]
    sizes_in = [owned[me] * sizes[rank] * across for rank in range(ranks)]
    came = sent.new_empty(sum(sizes_in))
    dist.all_to_all_single(came, sent, sizes_in, sizes_out, group=group)
    parts = [
        part.view(owned[me], *_with(mine.shape[1:], dim - 1, sizes[rank]))
        for rank, part in enumerate(torch.split(came, sizes_in))
    ]
    done = zeropower_divided(torch.cat(parts, dim), shares[1:], steps)
    sent = torch.cat([part.reshape(-1) for part in torch.split(done, list(sizes), dim)])
    came = sent.new_empty(sum(sizes_out))
    dist.all_to_all_single(came, sent, sizes_out, sizes_in, group=group)
    result = torch.empty_like(mine)
    for rank, part in enumerate(torch.split(came, sizes_out)):
        result[rank::ranks] = part.view(owned[rank], *mine.shape[1:])
    return result


def _with(shape: torch.Size, dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])
