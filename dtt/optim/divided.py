"""Muon's orthogonalization where ranks divide the matrices by rows (FSDP2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dtt.optim.muon import zeropower


def zeropower_divided(updates: Tensor, parameter: Any, steps: int) -> Tensor:
    """Return `zeropower` of K matrices [M, N] of which each rank has `updates` [K, its rows, N].

    `parameter`, a DTensor divided along its last mesh dim, says who has which rows. Each matrix is
    gathered on one rank, in bfloat16, and only that one computes it: two exchanges in all, where a
    DTensor in torch.optim.Muon would make fifteen for each matrix.
    """
    group = parameter.device_mesh.get_group(parameter.device_mesh.ndim - 1)
    ranks, me = dist.get_world_size(group), dist.get_rank(group)
    count, (height, width) = len(updates), parameter.shape
    # As torch.chunk divides rows: the last ranks may have fewer, or none.
    share = -(-height // ranks)
    rows = [max(min(share, height - share * rank), 0) for rank in range(ranks)]
    owned = [len(range(rank, count, ranks)) for rank in range(ranks)]
    mine = updates.bfloat16()
    sent = torch.cat([mine[rank::ranks].reshape(-1) for rank in range(ranks)])
    sizes_out = [owned[rank] * rows[me] * width for rank in range(ranks)]
    sizes_in = [owned[me] * rows[rank] * width for rank in range(ranks)]
    came = sent.new_empty(sum(sizes_in))
    dist.all_to_all_single(came, sent, sizes_in, sizes_out, group=group)
    parts = [
        part.view(owned[me], rows[rank], width)
        for rank, part in enumerate(torch.split(came, sizes_in))
    ]
    done = zeropower(torch.cat(parts, 1), steps)
    sent = torch.cat([part.reshape(-1) for part in torch.split(done, rows, dim=1)])
    came = sent.new_empty(sum(sizes_out))
    dist.all_to_all_single(came, sent, sizes_out, sizes_in, group=group)
    result = torch.empty_like(mine)
    for rank, part in enumerate(torch.split(came, sizes_out)):
        result[rank::ranks] = part.view(owned[rank], rows[me], width)
    return result
