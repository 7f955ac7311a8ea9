"""Causal attention as matrix products over blocks of queries: on CPUs, and with dropout anywhere.

PyTorch's fused CPU attention spends most of a training step of a small model in its backward pass;
plain matrix products run near the machine's peak and take a third of the time (docs/benchmarks.md).
Its fused attention on any device drops weights by a generator of its own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dtt.model.dropout import AttentionDropout, kept

BLOCK = 256
"""Queries per block: later blocks of keys are not touched, so long contexts save half the work."""


class BlockedAttention(torch.autograd.Function):
    """softmax(Q K^T / sqrt(width) + causal mask) V for q [N, Q, width] and k, v [N, T, width].

    There is one N per head, and the queries are those of the last Q keys. `hidden` [B or 1, 1, Q,
    T] says what else a query does not see; heads of one row of the batch follow each other in N.
    With `keys` [N, Q, 1] of `kept`, weights after the softmax are dropped at `rate`. Keeps the
    probabilities for the backward pass: up to N x Q x T numbers, and as many bytes for dropout.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden: Tensor | None,
        keys: Tensor | None,
        rate: float,
    ) -> Tensor:
        length, before, scale = q.shape[1], k.shape[1] - q.shape[1], q.shape[2] ** -0.5
        probabilities, stays, out = [], [], []
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            seen = before + stop
            # A graph that torch.compile traces has no use for the cache, and says so.
            future = _future.__wrapped__ if torch.compiler.is_compiling() else _future
            mask = future(stop - start, seen, q.dtype, q.device)
            transposed = k[:, :seen].transpose(1, 2)
            scores = torch.baddbmm(mask, q[:, start:stop], transposed, alpha=scale)
            if hidden is not None:
                heads = scores.view(len(hidden), -1, stop - start, seen)
                heads.masked_fill_(hidden[:, :, start:stop, :seen], float("-inf"))
            weights = torch.softmax(scores, -1)
            probabilities.append(weights)
            if keys is not None:
                stays.append(kept(keys[:, start:stop], seen, rate))
                weights = weights * stays[-1]
            out.append(torch.bmm(weights, v[:, :seen]))
        ctx.save_for_backward(q, k, v, *probabilities, *stays)
        ctx.rate, ctx.blocks = rate, len(probabilities)
        y = out[0] if len(out) == 1 else torch.cat(out, 1)
        return y if keys is None else y.div_(1 - rate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        probabilities, stays = saved[: ctx.blocks], saved[ctx.blocks :]
        total, scale = k.shape[1], q.shape[2] ** -0.5
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        if stays:
            grad = grad / (1 - ctx.rate)
        # From the last block, which sees all keys, so that it fills dk and dv and others add.
        for index in reversed(range(ctx.blocks)):
            weights = used = probabilities[index]
            start, seen = index * BLOCK, weights.shape[2]
            stop = start + weights.shape[1]
            part = grad[:, start:stop]
            dweights = torch.bmm(part, v[:, :seen].transpose(1, 2))
            if stays:
                dweights *= stays[index]
                used = weights * stays[index]
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            dscores *= scale
            dq[:, start:stop] = torch.bmm(dscores, k[:, :seen])
            dk_part = torch.bmm(dscores.transpose(1, 2), q[:, start:stop])
            dv_part = torch.bmm(used.transpose(1, 2), part)
            if seen == total:
                dk.copy_(dk_part)
                dv.copy_(dv_part)
            else:
                dk[:, :seen] += dk_part
                dv[:, :seen] += dv_part
        return dq, dk, dv, None, None, None


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: AttentionDropout | None = None,
) -> Tensor:
    """Return causal attention [B, heads, Q, width] of the queries of the last Q of T keys.

    k and v may have fewer, shared heads. `mask`, which broadcasts to [B, 1, Q, T], is true where a
    query sees a key; every query sees itself. `dropout` drops weights after the softmax.
    """
    batch, heads, length, width = q.shape
    if k.shape[1] != heads:
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.reshape(batch * heads, -1, width) for x in (q, k, v))
    hidden = None if mask is None else ~mask.view(-1, 1, length, k.shape[1])
    keys, rate = None, 0.0
    if dropout is not None:
        keys, rate = dropout.query_keys(heads).view(batch * heads, length, 1), dropout.rate
    y: Tensor = BlockedAttention.apply(q, k, v, hidden, keys, rate)  # type: ignore[no-untyped-call]
    return y.view(batch, heads, length, width)


@lru_cache(maxsize=64)
def _future(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Minus infinity where a key comes after the query; the last query sees all keys."""
    full = torch.full((queries, keys), float("-inf"), dtype=dtype, device=device)
    return full.triu_(keys - queries + 1)
