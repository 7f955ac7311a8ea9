"""Parameters, gradients and optimizer state divided among ranks: FSDP2, and HSDP with replicas.

Each block, and what is around the blocks, is gathered when it is needed (Rajbhandari et al. 2020,
ZeRO, stage 3). Gradients are summed over the ranks, not averaged: the loss is already divided by
the targets of the whole step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)

from dtt.config.parallel import Parallel
from dtt.model.experts import Router, Stacks


def shard(
    objective: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype,
    parallel: Parallel,
    experts_mesh: DeviceMesh | None = None,
) -> nn.Module:
    """Divide the parameters of `objective` over `mesh`, those of each block apart; return it.

    They are gathered in `dtype`, but for routers, and gradients are summed in fp32. With
    `parallel.reshard` a block's parameters are given up after its forward and gathered again for
    its backward; with `parallel.offload` they are in CPU memory otherwise. Experts are divided over
    a mesh of their own, where ranks have different ones.
    """
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": parallel.reshard}
    if parallel.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = exact
    if dtype != torch.float32:
        policy = replace(exact, param_dtype=dtype)
    for block in blocks:
        if next(block.parameters(), None) is None:  # another stage of a pipeline has it
            continue
        for module in block.modules():
            if isinstance(module, Router) and policy is not exact:
                fully_shard(module, mp_policy=exact, **options)
            if isinstance(module, Stacks) and experts_mesh is not None:
                fully_shard(module, mp_policy=policy, **(options | {"mesh": experts_mesh}))
        fully_shard(block, mp_policy=policy, **options)
    fully_shard(objective, mp_policy=policy, **(options | {"reshard_after_forward": False}))
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo can only sum
    return objective
