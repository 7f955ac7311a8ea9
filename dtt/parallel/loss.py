"""Cross-entropy where each rank has some rows of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from dtt.model.loss import ChunkedCrossEntropy
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
        found: Tensor = ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            whole, head, targets.flatten(), ignored, False, self.loss_and_gradient
        )
        return found

    def loss_and_gradient(self, logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
        """Return the summed loss given this rank's logits [N, V / ranks], which become their
        gradient."""
        counted = targets != ignored
        index = (targets.where(counted, 0) - self.first)[:, None]  # may be another rank's
        inside = (index >= 0) & (index < logits.shape[1])
        place, weights = index.where(inside, 0), counted.float()[:, None]
        wide = logits.float()
        top = wide.amax(-1, keepdim=True)
        dist.all_reduce(top, ReduceOp.MAX, group=self.group)
        wide -= top
        chosen = wide.gather(1, place) * inside
        probabilities = wide.exp_()
        sums = torch.cat([probabilities.sum(-1, keepdim=True), chosen], 1)
        dist.all_reduce(sums, group=self.group)
        total, chosen = sums[:, :1], sums[:, 1:]
        probabilities /= total
        probabilities.scatter_add_(1, place, -inside.float())
        torch.mul(probabilities, weights, out=logits)
        return ((total.log() - chosen) * weights).sum()
