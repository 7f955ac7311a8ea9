"""Expert parallelism: each rank has some experts, and tokens travel to them and back.

Of everything else the ranks have copies, and of sequences each its own (Lepikhin et al. 2020,
GShard, arxiv.org/abs/2006.16668). No token is dropped: ranks first say how many rows they send.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from dtt.model.decoder import Decoder
from dtt.model.experts import Stacks
from dtt.parallel.part import Part


def divide_experts(model: Decoder, group: ProcessGroup, parts: dict[str, Part]) -> set[str]:
    """Leave this rank its share of the experts, note it in `parts`, and return their names."""
    rank, ranks = group.rank(), group.size()
    found = set()
    for name, module in model.named_modules():
        if not isinstance(module, Stacks):
            continue
        for leaf, stack in list(module.named_parameters()):
            size, full = len(stack) // ranks, f"{name}.{leaf}"
            part = parts.get(full) or Part.all_of(tuple(stack.shape))
            parts[full] = part.narrow(0, rank * size, (rank + 1) * size)
            setattr(module, leaf, nn.Parameter(parts[full].take(stack.detach())))
            found.add(full)
    for moe in model.experts():
        moe.apply_experts = _Travel(moe.experts, group)
    return found


@dataclass(frozen=True)
class _Travel:
    """Sends rows to the ranks that have their experts, and back."""

    experts: Stacks
    group: ProcessGroup

    def __call__(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Return what all experts make of rows [M, dim], sorted by expert; counts [experts]."""
        ranks = self.group.size()
        came = torch.empty_like(counts)
        dist.all_to_all_single(came, counts, group=self.group)
        table = came.view(ranks, -1)  # of each rank, rows for each expert here
        sent, received = torch.stack([counts.view(ranks, -1), table]).sum(2).tolist()
        inside = _exchanged(rows, received, sent, self.group)
        # As they came, rows are sorted by rank; experts want them sorted by expert.
        experts = torch.arange(table.shape[1], device=rows.device).repeat(ranks)
        size = sum(received)  # known, so the device is not asked again
        order = experts.repeat_interleave(table.flatten(), output_size=size).argsort(stable=True)
        made = self._made(inside[order], table.sum(0))
        return _exchanged(made[order.argsort()], sent, received, self.group)

    def _made(self, rows: Tensor, counts: Tensor) -> Tensor:
        if len(rows):
            made: Tensor = self.experts(rows, counts)
            return made
        # Without any row there would be no gradient, not even zero, for ranks to sum.
        counts[0] += 1
        return self.experts(rows.new_zeros(1, rows.shape[1]), counts)[:0] + rows


def _exchanged(rows: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    found: Tensor = _Exchange.apply(rows, received, sent, group)  # type: ignore[no-untyped-call]
    return found


class _Exchange(torch.autograd.Function):
    """So many rows to each rank and from each; gradients go the other way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, received: list[int], sent: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        found = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        found = grad.new_empty(sum(ctx.sent), grad.shape[1])
        dist.all_to_all_single(found, grad.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return found, None, None, None
