"""Activation checkpointing: what a block computed forward is computed again backward.

Chen et al. 2016, arxiv.org/abs/1604.06174; selectively as in Korthikanti et al. 2022,
arxiv.org/abs/2205.05198.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

KEPT = (
    *("aten.mm", "aten.addmm", "aten._scaled_mm", "aten._grouped_mm"),
    *("aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_efficient_attention"),
    *("aten._scaled_dot_product_cudnn_attention",),
    *("_c10d_functional.reduce_scatter_tensor", "_c10d_functional.all_gather_into_tensor"),
)
"""What is kept when only the rest is recomputed: products, fused attention, what came from other
ranks. Not bmm and baddbmm, attention in blocks on a CPU: its scores are what is large."""


@dataclass(frozen=True)
class Recompute:
    """How a decoder calls its blocks in training."""

    selective: bool = False
    """Whether the outputs of KEPT are kept."""
    every: int = 1
    """One block of so many is recomputed."""

    def __call__(self, index: int, block: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        """Return the block's output [B, T, dim]."""
        options: dict[str, Any] = {}
        if self.selective:
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
        if index % self.every:
            plain: Tensor = block(*inputs)
            return plain
        # Nothing in a block draws from torch's generators.
        found: Tensor = checkpoint(
            block, *inputs, use_reentrant=False, preserve_rng_state=False, **options
        )
        return found


def _policy(context: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _kept() else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _kept() -> set[Any]:
    found = set()
    for name in KEPT:
        space, _, op = name.partition(".")
        if hasattr(getattr(torch.ops, space), op):
            found.add(getattr(getattr(torch.ops, space), op).default)
    return found
