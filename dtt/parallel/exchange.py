"""What ranks of one group exchange inside of a forward and a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed import ProcessGroup

from dtt.dist import local

# The names before PyTorch 2.13 warn from then on.
_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
_scatter = getattr(collectives, "reduce_scatter_single", None) or collectives.reduce_scatter_tensor
_wait: Callable[[Tensor], Tensor] = collectives.wait_tensor


def _gathered(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    found = _wait(_gather(x.contiguous(), 0, group))
    if dim:
        found = torch.cat(found.chunk(dist.get_world_size(group)), dim)
    return found


def _scattered(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    if dim:
        x = torch.cat(x.chunk(dist.get_world_size(group), dim))
    return _wait(_scatter(x.contiguous(), "sum", 0, group))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gathered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scattered(grad, ctx.dim, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _scattered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(grad, ctx.dim, ctx.group), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _wait(collectives.all_reduce(x, "sum", group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Return the ranks' equal shares along `dim` one after the other, in the ranks' order.

    Each rank then does something of its own with the whole, so gradients are summed over them.
    """
    found: Tensor = _Gather.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return found


def scatter_sum(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Return this rank's share along `dim` of the sum of the ranks' tensors."""
    found: Tensor = _Scatter.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return found


def sum_forward(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of the ranks' tensors, from which all of them compute the same.

    The gradient of a rank's own is that of the sum.
    """
    found: Tensor = _Sum.apply(x, group)  # type: ignore[no-untyped-call]
    return found


def sum_gradients(
    parameters: list[torch.nn.Parameter], group: ProcessGroup, device: torch.device
) -> None:
    """Sum the gradients of parameters of which each rank has a copy and a share of the gradient.

    On `device`, which the group can exchange, wherever they are.
    """
    tensors = [local(p.grad) for p in parameters if p.grad is not None]
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(device)
    dist.all_reduce(flat, group=group)
    start = 0
    for tensor in tensors:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()
