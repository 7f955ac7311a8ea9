"""Parameters, gradients and optimizer state divided among ranks: FSDP2, and HSDP with replicas.

Each block, and what is around the blocks, is gathered when it is needed (Rajbhandari et al. 2020,
ZeRO, stage 3). Gradients are summed over the ranks, not averaged: the loss is already divided by
the targets of the whole step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(
    objective: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype,
    reshard: bool,
) -> nn.Module:
    """Divide the parameters of `objective` over `mesh`, those of each block apart; return it.

    They are gathered in `dtype`, and gradients are summed in fp32. With `reshard` a block's
    parameters are given up after its forward and gathered again for its backward.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(objective, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo can only sum
    return objective


def is_sharded(objective: nn.Module) -> bool:
    """Whether every forward of it needs all of its ranks at once."""
    return isinstance(objective, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor from the ranks that have its parts; all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield whole tensors by name, in CPU memory, on the ranks that keep them; all must ask."""
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            yield name, full.cpu()


def divided_like(tensor: Tensor, example: Tensor) -> Tensor:
    """Return the part of `tensor`, which every rank has, that `example` has on this rank."""
    if not isinstance(example, DTensor) or tensor.shape != example.shape:
        return tensor
    placed = tensor.to(example.device)
    return distribute_tensor(placed, example.device_mesh, example.placements, src_data_rank=None)
