"""dtt's attention of CPUs in the models of `transformers`, where it is faster and the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtt.model.attention import MOST_SCORES
from dtt.model.blocked_attention import blocked_attention

NAME = "dtt"
"""What `transformers` knows it by."""
PLAIN = {"position_ids", "use_cache", "is_causal", "output_attentions", "sliding_window"}
"""What models hand to any attention, and what sdpa does not look at."""


def use_blocks(model: Any) -> None:
    """Have a model that computes attention by sdpa train with blocks of queries on CPUs."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return causal attention [B, T, heads, width]: in training on a CPU in blocks, else sdpa."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if dropout or not _in_blocks(module, query, key, value, mask, others):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **others
        )
        return found
    width = query.shape[-1]
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if scaling is not None and scaling != width**-0.5:
        query = query * (scaling * width**0.5)
    with torch.autocast("cpu", enabled=False):  # all of it in one type, as sdpa does it
        out = blocked_attention(query.to(kind), key.to(kind), value.to(kind), mask)
    return out.transpose(1, 2).contiguous(), None


def _in_blocks(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    others: dict[str, Any],
) -> bool:
    """Whether it is what `blocked_attention` computes: a query sees itself, none after it, and what
    the mask leaves."""
    unusual = any(value is not None for name, value in others.items() if name not in PLAIN)
    causal = others.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    square = query.shape[2] == key.shape[2] and key.shape == value.shape
    of_rows = mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)
    return (
        not unusual
        and bool(causal)
        and square
        and of_rows
        and query.device.type == "cpu"
        and query.requires_grad
        and query.shape[0] * query.shape[1] * query.shape[2] ** 2 <= MOST_SCORES
    )
