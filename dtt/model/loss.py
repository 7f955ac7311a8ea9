"""Cross-entropy of a large vocabulary without the logits of all tokens in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LARGE_VOCABULARY = 8192
"""From here on the logits of a batch outweigh everything else that a step keeps."""
CHUNK = 2048
"""Tokens whose logits exist at a time."""
BLOCK = 16
"""Tokens whose fp32 probabilities exist at a time on a CPU, where they then stay in its cache."""


def sum_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, ignored: int, *, twice: bool = False
) -> Tensor:
    """Return the summed loss in nats (fp32, 0-dim) of targets [...] given hidden [..., dim].

    Targets equal to `ignored` count nothing. `head` is [vocabulary, dim]. Logits are in the type of
    `hidden`, the softmax in fp32. `twice` is for schedules that go backward once for the gradient
    of `hidden` and once for that of `head`.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if len(head) < LARGE_VOCABULARY:
        logits = F.linear(hidden, head.to(hidden.dtype))
        return F.cross_entropy(logits.float(), targets, ignore_index=ignored, reduction="sum")
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        loss: Tensor = ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, head, targets, ignored, twice, loss_and_gradient
        )
        return loss
    return _chunked_loss(hidden, head, targets, ignored)


def sum_of_logits(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Return the summed loss of targets [...] given logits [..., vocabulary], which are all there:
    for models that do more to them than a product with the head."""
    return F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=ignored, reduction="sum"
    )


class ChunkedCrossEntropy(torch.autograd.Function):
    """The summed loss, with its gradients found while the logits of a chunk are there.

    Going forward computes the gradients for an incoming gradient of one, and going backward scales
    them, so no logits are kept or computed twice. The head's gradient is summed in fp32. `find` is
    `loss_and_gradient`, or what takes its place where ranks divide the vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        ignored: int,
        twice: bool,
        find: Callable[[Tensor, Tensor, int], Tensor],
    ) -> Tensor:
        weight = head.to(hidden.dtype)
        want_hidden, want_head = ctx.needs_input_grad[:2]
        loss = torch.zeros((), device=hidden.device)
        dhidden = torch.empty_like(hidden) if want_hidden else None
        dhead = torch.zeros(head.shape, device=head.device) if want_head else None
        for rows in _slices(len(hidden), CHUNK):
            logits = F.linear(hidden[rows], weight)
            loss += find(logits, targets[rows], ignored)
            if dhidden is not None:
                torch.mm(logits, weight, out=dhidden[rows])
            if dhead is not None:
                dhead += logits.t() @ hidden[rows]
        ctx.head_dtype, ctx.twice = head.dtype, twice
        ctx.save_for_backward(dhidden, dhead)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dhead = ctx.saved_tensors
        if ctx.twice:
            found = [None if each is None else each * grad for each in (dhidden, dhead)]
            return (*found, None, None, None, None)
        # In place, as dhead is the largest tensor of a step; a second backward pass through the
        # same graph is then refused by autograd, which sees that a saved tensor has changed.
        if dhidden is not None:
            dhidden.mul_(grad)
        if dhead is not None:
            dhead = dhead.mul_(grad).to(ctx.head_dtype)
        return dhidden, dhead, None, None, None, None


def loss_and_gradient(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Return the summed loss of logits [N, V], which become its gradient, softmax - one-hot."""
    loss = torch.zeros((), device=logits.device)
    minus_one = logits.new_full((1, 1), -1.0, dtype=torch.float32)
    counted = targets != ignored
    targets = targets.where(counted, 0)[:, None]
    weights = counted.float()[:, None]
    for rows in _slices(len(logits), BLOCK if logits.device.type == "cpu" else len(logits)):
        index, weight = targets[rows], weights[rows]
        log_probs = torch.log_softmax(logits[rows], -1, dtype=torch.float32)
        loss -= (log_probs.gather(1, index) * weight).sum()
        probs = log_probs.exp_()
        probs.scatter_add_(1, index, minus_one.expand_as(index))
        torch.mul(probs, weight, out=logits[rows])
    return loss


def _chunked_loss(hidden: Tensor, head: Tensor, targets: Tensor, ignored: int) -> Tensor:
    weight = head.to(hidden.dtype)
    loss = torch.zeros((), device=hidden.device)
    for chunk in _slices(len(hidden), CHUNK):
        logits, wanted = F.linear(hidden[chunk], weight), targets[chunk]
        for rows in _slices(len(logits), BLOCK if logits.device.type == "cpu" else len(logits)):
            loss += F.cross_entropy(
                logits[rows].float(), wanted[rows], ignore_index=ignored, reduction="sum"
            )
    return loss


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, max(size, 1)))
