"""What a model of `transformers` does is looked at, not believed, before it is trained.

A model whose tokens see what comes after them learns to copy, at a loss that looks splendid; one
that ignores places in documents trains on other text than was asked for. Both are found with a few
tokens: those that must not be seen are changed, and the loss of others must stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from dtt.data.windows import IGNORED
from dtt.errors import ConfigError
from dtt.model.hf.model import HfCausalModel
from dtt.model.objective import Objective

TOKENS = 8
SAME = 1e-6
"""Largest relative difference of a loss that what is not seen may make, in fp32."""


@torch.no_grad()
def examine(objective: Objective) -> None:
    """Look at a model that has its weights, on all ranks that divide it; ConfigError: its tokens
    see those after them."""
    model = objective.model
    assert isinstance(model, HfCausalModel)
    tokens = few_tokens(model)
    length = tokens.shape[1]
    if length < 2:
        return
    half = length // 2
    with looking(objective):
        if not _unmoved(objective, tokens, slice(half, None), slice(half), None):
            raise ConfigError(
                f"model.architecture: in {model.settings.architecture} tokens see those after "
                "them: it is no causal language model",
                "take another architecture",
            )
        if model.takes_positions:
            places = torch.arange(length, device=tokens.device)[None] % half
            model.isolates = _unmoved(objective, tokens, slice(half), slice(half, None), places)
        else:
            model.isolates = False


def few_tokens(model: HfCausalModel) -> Tensor:
    """Return tokens [1, T] to look at a model with, an even number of them."""
    length, size = min(TOKENS, model.settings.context) // 2 * 2, model.settings.vocab_size or 1
    return torch.arange(1, length + 1, device=model.head_weight.device)[None] % size


@contextmanager
def looking(objective: Objective) -> Iterator[None]:
    """Compute in fp32, without dropout and as the code is written."""
    model = objective.model
    assert isinstance(model, HfCausalModel)
    dtype, training = model.compute_dtype, model.training
    objective.eval()
    model.compute_in(torch.float32)
    try:
        with _uncompiled(model):
            yield
    finally:
        model.compute_in(dtype)
        objective.train(training)


def _uncompiled(model: HfCausalModel) -> AbstractContextManager[None]:
    """Compiled blocks would be compiled for these few tokens too."""
    if any(block._compiled_call_impl is not None for block in model.blocks):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def _unmoved(
    objective: Objective, tokens: Tensor, changed: slice, kept: slice, places: Tensor | None
) -> bool:
    """Whether the loss of some columns stays where it is when tokens in others change."""
    size = objective.model.settings.vocab_size or 1
    targets = torch.full_like(tokens, IGNORED)
    targets[:, kept] = 0
    others = tokens.clone()
    others[:, changed] = (others[:, changed] * 3 + 5) % size
    before, after = (float(objective(x, targets, places)) for x in (tokens, others))
    if not math.isfinite(before + after):
        raise ConfigError(
            f"the weights that the model starts from give no finite loss ({before}, {after})",
            "start from others (init_from)",
        )
    return abs(after - before) <= SAME * abs(before)
