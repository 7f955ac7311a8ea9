"""Cross-entropy where each rank has some rows of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, ReduceOp

from dtt.model.loss import CHUNK
from dtt.parallel.exchange import gather


@dataclass(frozen=True)
class DividedLoss:
    """The loss of `dtt.model.loss.sum_cross_entropy`; logits are never gathered."""

    first: int
    """This rank's first row of the vocabulary."""
    group: ProcessGroup

    def __call__(self, hidden: Tensor, head: Tensor, targets: Tensor, ignored: int) -> Tensor:
        """Return the summed loss of targets [B, T], the same on every rank, given this rank's
        share of hidden [B, T / ranks, dim] and of the head [V / ranks, dim]."""
        whole = gather(hidden, 1, self.group).flatten(0, 1)
        found: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
            whole, head, targets.flatten(), ignored, self.first, self.group
        )
        return found


class _CrossEntropy(torch.autograd.Function):
    """Gradients are found while the logits of a chunk are there, as in ChunkedCrossEntropy."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        ignored: int,
        first: int,
        group: ProcessGroup,
    ) -> Tensor:
        weight, wanted = head.to(hidden.dtype), any(ctx.needs_input_grad[:2])
        loss = torch.zeros((), device=hidden.device)
        dhidden = torch.empty_like(hidden) if wanted else None
        dhead = torch.zeros(head.shape, device=head.device) if wanted else None
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = F.linear(hidden[rows], weight)
            counted = targets[rows] != ignored
            more, gradient = _loss_and_gradient(
                logits.float(), targets[rows].where(counted, 0) - first, counted, group
            )
            loss += more
            if dhidden is not None and dhead is not None:
                gradient = gradient.to(hidden.dtype)
                torch.mm(gradient, weight, out=dhidden[rows])
                dhead += gradient.t() @ hidden[rows]
        ctx.head_dtype = head.dtype
        ctx.save_for_backward(dhidden, dhead)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dhead = ctx.saved_tensors
        return dhidden.mul_(grad), dhead.mul_(grad).to(ctx.head_dtype), None, None, None, None


def _loss_and_gradient(
    logits: Tensor, index: Tensor, counted: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of this rank's logits [N, V / ranks], and the logits' gradient.

    `index` [N] is the target's place in them, which may be outside.
    """
    top = logits.amax(-1, keepdim=True)
    dist.all_reduce(top, ReduceOp.MAX, group=group)
    logits -= top
    inside = ((index >= 0) & (index < logits.shape[1]))[:, None]
    place = index[:, None].where(inside, 0)
    found = logits.gather(1, place) * inside
    probabilities = logits.exp_()
    sums = torch.cat([probabilities.sum(-1, keepdim=True), found], 1)
    dist.all_reduce(sums, group=group)
    total, chosen = sums[:, :1], sums[:, 1:]
    weights = counted.float()[:, None]
    loss = ((total.log() - chosen) * weights).sum()
    probabilities /= total
    probabilities.scatter_add_(1, place, -inside.float())
    return loss, probabilities * weights
