"""A mixture of experts in the place of an MLP: each token passes the few that a router chooses.

No token is dropped: an expert has as many rows as tokens chose it. It is single-device code; what
divides experts or sequences among ranks replaces `MoE.apply_experts` and `MoE.sum_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtt.config.model import Experts
from dtt.model.layers import ACTIVATIONS, MLP

SMALLEST_SUM = 1e-20  # of scores that a sigmoid made zero


class Router(nn.Module):
    """Which experts each token passes, and how much of each; in fp32 whatever the compute type.

    With balance by bias (Wang et al. 2024, arxiv.org/abs/2408.15664), `bias` [experts] is added to
    the scores for choosing only, and `counts` [experts] says how many tokens chose each since
    `move_biases`. Blocks that are recomputed count every token twice, which moves no bias.
    """

    bias: Tensor | None
    counts: Tensor

    def __init__(self, dim: int, settings: Experts) -> None:
        super().__init__()
        self.settings = settings
        self.weight = nn.Parameter(torch.empty(settings.number, dim))
        biased = settings.balance == "bias"
        self.register_buffer("bias", torch.zeros(settings.number) if biased else None)
        # On the CPU even where a model is built on `meta`: no checkpoint has them.
        counts = torch.zeros(settings.number, dtype=torch.int64, device="cpu")
        self.register_buffer("counts", counts, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return for x [B, T, dim] the weights and the numbers of the chosen experts, both
        [B, T, active], and the scores [B, T, experts]."""
        logits = F.linear(x.float(), self.weight.float())
        scores = logits.softmax(-1) if self.settings.scoring == "softmax" else logits.sigmoid()
        ranked = scores if self.bias is None else scores + self.bias
        chosen = ranked.topk(self.settings.active).indices
        weights = scores.gather(-1, chosen)
        if self.settings.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + SMALLEST_SUM)
        return weights, chosen, scores


@torch.no_grad()
def move_biases(routers: Sequence[Router], sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
    """Raise the bias of each expert that fewer tokens than the mean chose, lower that of others.

    By `bias_rate`, whatever the distance. `sum_over_ranks` adds up counts [routers, experts]; all
    start from zero again.
    """
    if not routers:
        return
    counts = sum_over_ranks(torch.stack([router.counts for router in routers]))
    # sign(mean - count) in whole numbers, which are exact in any order of ranks.
    signs = (counts.sum(-1, keepdim=True) - counts.shape[-1] * counts).sign()
    for router, sign in zip(routers, signs, strict=True):
        assert router.bias is not None
        router.bias.add_(sign, alpha=router.settings.bias_rate)
        router.counts.zero_()


class Stacks(nn.Module):
    """MLPs without biases, whose matrices are stacked: `up`, `gate` (swiglu) and `down`."""

    def __init__(self, number: int, dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up = nn.Parameter(torch.empty(number, hidden, dim))
        gate = torch.empty(number, hidden, dim) if activation == "swiglu" else None
        self.gate = None if gate is None else nn.Parameter(gate)
        self.down = nn.Parameter(torch.empty(number, dim, hidden))
        self.grouped_mm: Callable[..., Tensor] = F.grouped_mm

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Return what the experts make of rows [M, dim], in their type.

        The first counts[0] rows are the first expert's, and so on; an expert may have none.
        """
        ends = counts.cumsum(0).to(torch.int32)

        def product(x: Tensor, stack: Tensor) -> Tensor:
            return self.grouped_mm(x, stack.to(x.dtype).mT, offs=ends)

        inner = product(rows, self.up)
        if self.gate is not None:
            inner = self.activation(product(rows, self.gate)) * inner
        else:
            inner = self.activation(inner)
        return product(inner, self.down)

    def keep_out_of_graphs(self) -> None:
        """Let torch.compile leave the products alone, which it knows in bf16 only."""
        self.grouped_mm = torch.compiler.disable(F.grouped_mm)  # type: ignore[no-untyped-call]


class MoE(nn.Module):
    """sum over the chosen experts of weight x expert(x), plus the shared expert; no biases.

    A token's output does not depend on the tokens beside it but for the rounding of matrix
    products. In training with balance by loss, `auxiliary_loss` adds to the gradients, not to what
    is returned, with the factor `scale` that the loss has in the backward pass.
    """

    scale: Tensor

    def __init__(self, dim: int, hidden: int, activation: str, settings: Experts) -> None:
        super().__init__()
        self.settings = settings
        self.router = Router(dim, settings)
        self.experts = Stacks(settings.number, dim, hidden, activation)
        self.shared = (
            MLP(dim, settings.shared * hidden, activation, bias=False) if settings.shared else None
        )
        self.register_buffer("scale", torch.ones((), device="cpu"), persistent=False)
        self.apply_experts: Callable[[Tensor, Tensor], Tensor] = self.experts.__call__
        """From rows [M, dim] in the order of experts, and how many each has, to their outputs."""
        self.sum_rows: Callable[[Tensor], Tensor] = _as_it_is
        """Adds up figures [B, N] over the ranks that share a sequence; its gradient is that of a
        rank's own part (the identity), since every rank computes the whole auxiliary loss."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs [B, T, dim] of x [B, T, dim], in its type."""
        weights, chosen, scores = self.router(x)
        ones = torch.ones_like(chosen).flatten(1)
        counts = ones.new_zeros(x.shape[0], self.settings.number)
        counts = counts.scatter_add(1, chosen.flatten(1), ones)  # of each sequence
        y = self._mixed(x.flatten(0, 1), weights.flatten(0, 1), chosen.flatten(), counts.sum(0))
        y = y.view(x.shape)
        if self.shared is not None:
            y = y + self.shared(x)
        y = y.to(x.dtype)
        if self.training and self.settings.balance == "bias":
            self.router.counts += counts.sum(0)
        if self.training and self.settings.balance == "loss":
            loss = self.auxiliary_loss(scores, counts)
            y = _Attached.apply(y, loss, self.scale)  # type: ignore[no-untyped-call]
        return y

    def _mixed(self, tokens: Tensor, weights: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
        """Return the weighted sums [N, dim], in fp32, of what experts make of tokens [N, dim]."""
        active = self.settings.active
        order = chosen.argsort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        rows = _Rows.apply(tokens, order, places, active)  # type: ignore[no-untyped-call]
        made = self.apply_experts(rows, counts)
        made = _Rows.apply(made, places, order, 1)  # type: ignore[no-untyped-call]
        # A token's rows in its own order: what else is in the batch does not change the sum.
        return (made.view(-1, active, tokens.shape[1]).float() * weights[..., None]).sum(1)

    def auxiliary_loss(self, scores: Tensor, counts: Tensor) -> Tensor:
        """Return the balance loss (fp32, 0-dim) of the scores [B, T, experts] of whole sequences.

        Each sequence's own, times its tokens, so that it adds up as the cross-entropy does and no
        batching matters: balance_weight x T x sum over experts of f x P (DeepSeek-AI 2024,
        arxiv.org/abs/2412.19437, eq. 17-20), where f is the share of the T tokens that chose an
        expert, times experts / active, and P the mean of its share of their scores. `counts`
        [B, experts] says how many tokens chose each.
        """
        number = self.settings.number
        shares = scores / (scores.sum(-1, keepdim=True) + SMALLEST_SUM)
        tokens = scores.new_full((len(scores), 1), scores.shape[1])
        figures = self.sum_rows(torch.cat([counts.float(), shares.sum(1), tokens], -1))
        products = figures[:, :number] * figures[:, number:-1]
        factor = self.settings.balance_weight * number / self.settings.active
        return factor * (products / figures[:, -1:]).sum()

    def inactive_parameters(self) -> int:
        """Return how many parameters of the experts a token does not pass."""
        experts = sum(stack.numel() for stack in self.experts.parameters())
        return experts - experts * self.settings.active // self.settings.number


def _as_it_is(figures: Tensor) -> Tensor:
    return figures


class _Rows(torch.autograd.Function):
    """Row order[i] // copies of x as row i, where `places` is the inverse of `order`.

    Gradients of a row's copies are gathered and added up in their order. The index_add of autograd
    adds in any order on GPUs, and rounds bf16 at each addition.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.copies = copies
        return x.index_select(0, order // copies)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        rows = grad.index_select(0, places).view(-1, ctx.copies, grad.shape[1])
        return rows.sum(1), None, None, None


class _Attached(torch.autograd.Function):
    """x as it is; in the backward pass `loss` has the gradient `scale` (as Megatron-LM does it)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad, scale, None
