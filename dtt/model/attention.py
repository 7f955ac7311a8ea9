"""Causal self-attention with grouped queries, and the cache that generation keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtt.config.model import Model
from dtt.model.blocked_attention import blocked_attention
from dtt.model.dropout import AttentionDropout
from dtt.model.layers import Linear, RMSNorm
from dtt.model.positions import rotate

MOST_SCORES = 1 << 29
"""On a CPU attention in blocks is fastest, but it keeps half of so many scores for each layer; for
more than these the fused one is used, which keeps none."""
Attend = Callable[[Tensor, Tensor, Tensor, Any, AttentionDropout | None], Tensor]


class Cache:
    """Keys and values of the tokens so far, for every block.

    Rows may begin with padding, so that prompts of different lengths end at the same column:
    `padding` [B] counts it. `length` columns are filled. Entries are in the compute type `dtype`,
    on CPUs in fp32, where attention from one token takes a seventh of what it takes in bf16.
    """

    def __init__(
        self, settings: Model, batch: int, capacity: int, padding: Tensor, dtype: torch.dtype
    ) -> None:
        heads = settings.kv_heads or settings.heads
        width = settings.head_dim or settings.dim // settings.heads
        shape = (batch, heads, capacity, width)
        if padding.device.type == "cpu":
            dtype = torch.float32
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=padding.device) for _ in range(settings.layers)]
            for _ in range(2)
        )
        self.padding = padding
        self.length = 0
        # Asked once: each asking would make the host wait for the device.
        self._padded = bool(padding.any())

    def positions(self, count: int) -> Tensor:
        """Return the positions [B, count] of the next tokens; padding has position 0."""
        columns = torch.arange(self.length, self.length + count, device=self.padding.device)
        return (columns - self.padding[:, None]).clamp(min=0)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, heads, T, width] of new tokens and return all so far.

        The first ones come back as they are.
        """
        count, all_keys, all_values = keys.shape[2], self.keys[layer], self.values[layer]
        all_keys.narrow(2, self.length, count).copy_(keys)
        all_values.narrow(2, self.length, count).copy_(values)
        if self.length == 0:
            return keys, values
        stop = self.length + count
        return all_keys.narrow(2, 0, stop), all_values.narrow(2, 0, stop)

    def mask(self, count: int, window: int | None) -> Tensor | None:
        """Return which columns the next `count` tokens see, [B, 1, count, columns].

        None: all before each, as for one token, or for the first ones, where attention is plain
        causal attention and has its fast path.
        """
        device, total = self.padding.device, self.length + count
        plain = not self._padded and (window is None or total <= window)
        if plain and (count == 1 or self.length == 0):
            return None
        columns = torch.arange(total, device=device)
        rows = torch.arange(self.length, total, device=device)[:, None]
        seen = visible(rows, columns, window)
        real = columns >= self.padding[:, None, None, None]
        # A padded query sees itself, since a row without any column would be NaN.
        return (seen & real) | (rows == columns)


def visible(rows: Tensor, columns: Tensor, window: int | None) -> Tensor:
    seen = columns <= rows
    return seen if window is None else seen & (columns > rows - window)


def document_mask(positions: Tensor, window: int | None) -> Tensor:
    """Return which columns each token sees, [B, 1, T, T], given its place [B, T] in its document:
    none before the document's first."""
    columns = torch.arange(positions.shape[1], device=positions.device)
    first = (columns - positions)[:, None, :, None]
    return visible(columns[:, None], columns, window) & (columns >= first)


def causal_mask(
    length: int,
    device: torch.device,
    positions: Tensor | None,
    cache: Cache | None,
    window: int | None,
) -> Tensor | None:
    """Return what `length` new tokens see, for `attend`; None: themselves and all before."""
    if cache is not None:
        return cache.mask(length, window)
    if positions is not None:
        return document_mask(positions, window)
    if window is None or window >= length:
        return None
    places = torch.arange(length, device=device)
    return visible(places[:, None], places, window)


def _scores(q: Tensor, k: Tensor) -> int:
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: AttentionDropout | None = None
) -> Tensor:
    """Return softmax attention [B, heads, Q, width] of the queries of the last Q of T keys.

    `mask` [B or 1, 1, Q, T] is true where a query sees a key; None: itself and all before. k and v
    may have fewer, shared heads. `dropout` has the Q columns of these queries.
    """
    length, grouped = q.shape[2], q.shape[1] != k.shape[1]
    in_blocks = q.device.type == "cpu" and length > 1 and _scores(q, k) <= MOST_SCORES
    if dropout is not None or in_blocks:
        return blocked_attention(q, k, v, mask, dropout)
    bias: Any = mask
    if mask is None and 1 < length < k.shape[2]:
        from torch.nn.attention.bias import causal_lower_right  # a second, for what few need

        bias = causal_lower_right(length, k.shape[2])
    square = mask is None and length == k.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, bias, 0.0, square, enable_gqa=grouped)


class Attention(nn.Module):
    """Softmax attention over the tokens before, with rotary positions where the model has them.

    `attend` is the function of queries, keys and values, which what divides sequences replaces.
    """

    def __init__(self, settings: Model, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.width = settings.head_dim or settings.dim // settings.heads
        self.attend: Attend = attend
        inner, kv_inner = (
            self.width * settings.heads,
            self.width * (settings.kv_heads or settings.heads),
        )
        self.split = (inner, kv_inner, kv_inner)
        self.qkv = Linear(settings.dim, sum(self.split), bias=settings.bias)
        self.out = Linear(inner, settings.dim, bias=settings.bias)
        self.q_norm = RMSNorm(self.width, settings.norm_eps) if settings.qk_norm else None
        self.k_norm = RMSNorm(self.width, settings.norm_eps) if settings.qk_norm else None

    def forward(
        self,
        x: Tensor,
        table: Tensor | None,
        cache: Cache | None,
        mask: Tensor | None,
        dropout: AttentionDropout | None = None,
    ) -> Tensor:
        """Attend from each token of x [B, T, dim] to itself and all before, cached ones too."""
        batch, length, _ = x.shape
        # -1 infers the heads, so that a shard of them works unchanged.
        q, k, v = (
            part.view(batch, length, -1, self.width).transpose(1, 2)
            for part in self.qkv(x).split(self.split, dim=-1)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = self.attend(q.to(k.dtype), k, v, mask, dropout)
        return self.out(y.to(x.dtype).transpose(1, 2).reshape(batch, length, -1))
