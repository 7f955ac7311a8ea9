"""Parameters, gradients and optimizer state divided among ranks: FSDP2, and HSDP with replicas.

Each block, and what is around the blocks, is gathered when it is needed (Rajbhandari et al. 2020,
ZeRO, stage 3). Gradients are summed over the ranks, not averaged: the loss is already divided by
the targets of the whole step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from dtt.model.experts import Router, Stacks


def shard(
    objective: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype,
    reshard: bool,
    experts_mesh: DeviceMesh | None = None,
) -> nn.Module:
    """Divide the parameters of `objective` over `mesh`, those of each block apart; return it.

    They are gathered in `dtype`, but for routers, and gradients are summed in fp32. With `reshard`
    a block's parameters are given up after its forward and gathered again for its backward.
    Experts are divided over a mesh of their own, where ranks have different ones.
    """
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = exact
    if dtype != torch.float32:
        policy = replace(exact, param_dtype=dtype)
    for block in blocks:
        if next(block.parameters(), None) is None:  # another stage of a pipeline has it
            continue
        for module in block.modules():
            if isinstance(module, Router) and policy is not exact:
                fully_shard(module, mesh=mesh, mp_policy=exact, reshard_after_forward=reshard)
            if isinstance(module, Stacks) and experts_mesh is not None:
                fully_shard(
                    module, mesh=experts_mesh, mp_policy=policy, reshard_after_forward=reshard
                )
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(objective, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo can only sum
    return objective
