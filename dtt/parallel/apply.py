"""From a model on one device to one that all ranks of a layout train."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from dtt.config.parallel import AXES
from dtt.config.schema import Config
from dtt.dist import Runtime
from dtt.parallel.layout import Layout
from dtt.parallel.shard import shard

_REPLICATED: list[nn.Module] = []
"""Never freed: that joins gloo's thread with the interpreter locked, which hangs for good when the
thread needs the lock to free a tensor. The rank ends through `dtt.dist.leave`."""


def parallelize(
    objective: nn.Module,
    blocks: Iterable[nn.Module],
    layout: Layout,
    config: Config,
    runtime: Runtime,
    dtype: torch.dtype,
) -> nn.Module:
    """Return what the layout's ranks train together; `objective` itself can still be evaluated.

    `objective` computes the summed loss of a model, of which `blocks` are the large parts. In this
    order: compiled blocks, then divided or replicated parameters. Gradients come out as sums over
    the ranks (shard), or as means (replicate alone).
    """
    blocks = list(blocks)
    if config.training.compile:
        for block in blocks:
            block.compile()
    objective.train()
    if layout.shard > 1:
        mesh = init_device_mesh(runtime.device.type, layout.sizes, mesh_dim_names=AXES)
        mesh = mesh if layout.replicate > 1 else mesh["shard"]
        return shard(objective, blocks, mesh, dtype, config.parallel.reshard)
    if layout.replicate > 1:
        replicated = DistributedDataParallel(objective, gradient_as_bucket_view=True)
        _REPLICATED.append(replicated)
        return replicated
    return objective
