"""Rotary position embeddings and their scalings for longer contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dtt.config.model import Rotary


def frequencies(settings: Rotary, head_dim: int) -> tuple[Tensor, float]:
    """Return the rotation per token [head_dim / 2] in radians, and a factor for cos and sin.

    linear: Chen et al. 2023 (arxiv.org/abs/2306.15595). ntk: the base grows so that the lowest
    frequency is stretched by `factor` and the highest not at all. yarn: Peng et al. 2023
    (arxiv.org/abs/2309.00071), with its attention temperature. llama3: Meta's Llama 3.1 release.
    """
    even = torch.arange(0, head_dim, 2, dtype=torch.float64)
    theta, factor, original = settings.theta, settings.factor, settings.original_context
    plain = theta ** -(even / head_dim)
    match settings.scaling:
        case "none":
            return plain, 1.0
        case "linear":
            return plain / factor, 1.0
        case "ntk":
            stretched = theta * factor ** (head_dim / (head_dim - 2))
            return stretched ** -(even / head_dim), 1.0
        case "llama3":
            waves = 2 * math.pi / plain
            low, high = settings.low_freq_factor, settings.high_freq_factor
            keep = ((original / waves - low) / (high - low)).clamp(0, 1)
            return plain * keep + plain / factor * (1 - keep), 1.0
        case "yarn":

            def dim_of(turns: float) -> float:
                return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

            low_dim = max(math.floor(dim_of(settings.beta_fast)), 0)
            high_dim = min(math.ceil(dim_of(settings.beta_slow)), head_dim - 1)
            span = max(high_dim - low_dim, 0.001)
            stretch = ((torch.arange(head_dim // 2) - low_dim) / span).clamp(0, 1)
            temperature = 0.1 * math.log(factor) + 1.0
            return plain / factor * stretch + plain * (1 - stretch), temperature


def rotation_table(settings: Rotary, head_dim: int, length: int) -> Tensor:
    """Return cos and sin [2, length, head_dim / 2] of every position, in fp32."""
    per_token, scale = frequencies(settings, head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), per_token)
    return (torch.stack([angles.cos(), angles.sin()]) * scale).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of x [..., T, head_dim] by a table
    [2, ..., T, head_dim / 2].

    The pairing is Hugging Face's, so that weights are exchanged without a permutation.
    """
    cos, sin = table[0].to(x.dtype), table[1].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
