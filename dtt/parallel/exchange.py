"""What ranks of one group exchange inside of a forward and a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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

Change = Callable[[Tensor], Tensor]


def _gathered(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    found = _wait(_gather(x.contiguous(), 0, group))
    if dim:
        found = torch.cat(found.chunk(dist.get_world_size(group)), dim)
    return found


def _scattered(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    if dim:
        x = torch.cat(x.chunk(dist.get_world_size(group), dim))
    return _wait(_scatter(x.contiguous(), "sum", 0, group))


def _summed(x: Tensor, group: ProcessGroup) -> Tensor:
    return _wait(collectives.all_reduce(x.contiguous(), "sum", group))


def _own(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    return x.chunk(group.size(), dim)[group.rank()].contiguous()


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


class _Exchange(torch.autograd.Function):
    """One function of the tensor forward, and another of the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Change, back: Change) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


def _exchange(x: Tensor, there: Change, back: Change) -> Tensor:
    found: Tensor = _Exchange.apply(x, there, back)  # type: ignore[no-untyped-call]
    return found


def gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Return the ranks' equal shares along `dim` one after the other, in the ranks' order.

    Each rank then does something of its own with the whole, so gradients are summed over them.
    """
    there = partial(_gathered, dim=dim, group=group)
    return _exchange(x, there, partial(_scattered, dim=dim, group=group))


def scatter_sum(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Return this rank's share along `dim` of the sum of the ranks' tensors."""
    there = partial(_scattered, dim=dim, group=group)
    return _exchange(x, there, partial(_gathered, dim=dim, group=group))


def sum_forward(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of the ranks' tensors, from which all of them compute the same.

    The gradient of a rank's own is that of the sum.
    """
    return _exchange(x, partial(_summed, group=group), _same)


def sum_backward(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return `x`, the same on all ranks, with which each does something of its own: its gradient is
    the sum of theirs."""
    return _exchange(x, _same, partial(_summed, group=group))


def gather_same(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """As `gather`, where all ranks then do the same with the whole: a rank's gradient is its share
    of the whole's."""
    there = partial(_gathered, dim=dim, group=group)
    return _exchange(x, there, partial(_own, dim=dim, group=group))


def share(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Return this rank's share along `dim` of `x`, the same on all ranks, as is its gradient."""
    there = partial(_own, dim=dim, group=group)
    return _exchange(x, there, partial(_gathered, dim=dim, group=group))


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
