"""FLOPs of training against PyTorch's counter, and attention against a count by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dtt.config.layers import FOLDER, preset_model
from dtt.config.model import Model
from dtt.metrics.flops import training_flops
from dtt.model.decoder import Decoder
from dtt.model.objective import Objective

PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SMALL: dict[str, Any] = {"layers": 3, "context": 48, "vocab_size": 257}
BATCH = 2


def small(preset: str) -> Model:
    """A preset's model with its kind of everything, but small; its ratios of widths stay."""
    settings = Model(**preset_model(preset))
    heads, kv_heads = settings.heads, settings.kv_heads or settings.heads
    group = heads // kv_heads
    changes: dict[str, Any] = SMALL | {"dim": 64, "heads": 2 * group, "kv_heads": 2}
    changes["head_dim"] = 24 if settings.head_dim else 64 // (2 * group) * 2
    if settings.hidden:
        changes["hidden"] = max(8, round(64 * settings.hidden / settings.dim / 8) * 8)
    if settings.experts is not None:
        few = {"number": 8, "active": min(settings.experts.active, 3), "hidden": 40}
        changes["experts"] = settings.experts.model_copy(update=few)
    return settings.model_copy(update=changes)


def grouped(a: Any, b: Any, offs: Any = None, *rest: Any, **options: Any) -> int:
    """What a grouped product costs: its rows with one matrix each, or its columns in groups."""
    if len(a) == 2 and len(b) == 3:
        return 2 * a[0] * a[1] * b[2]
    return 2 * a[0] * a[1] * b[1]


def counted(settings: Model) -> int:
    """FLOPs per token of everything but attention, as PyTorch counts them in a training step."""
    model = Decoder(settings)
    model.init_weights(0)
    objective = Objective(model).train()

    def no_products(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: Any = None) -> Tensor:
        shared = q.shape[1] // k.shape[1]
        return q + (k + v).repeat_interleave(shared, dim=1)

    for block in model.blocks:
        block.attention.attend = no_products
    tokens = torch.randint(settings.vocab_size or 0, (BATCH, settings.context))
    mapping = {torch.ops.aten._grouped_mm: grouped}
    keys = torch.arange(BATCH) if settings.dropout else None
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        objective(tokens, tokens, keys=keys).backward()
    return counter.get_total_flops() / tokens.numel()


def seen_by_hand(settings: Model) -> int:
    """FLOPs of attention in a whole sequence: two products of a width for each pair that sees each
    other, and twice that backward."""
    width = settings.head_dim or settings.dim // settings.heads
    pairs = sum(
        1
        for row in range(settings.context)
        for column in range(row + 1)
        if settings.window is None or column > row - settings.window
    )
    return 3 * 2 * 2 * width * settings.heads * settings.layers * pairs


@pytest.mark.parametrize("preset", PRESETS)
def test_matrices_are_those_that_pytorch_counts(preset: str) -> None:
    settings = small(preset)
    found = training_flops(settings)
    assert found.matrices == pytest.approx(counted(settings), rel=0.01)
    assert found.attention * settings.context == pytest.approx(seen_by_hand(settings))


@pytest.mark.parametrize(
    "changes",
    [
        {"window": 7},
        {"window": 1000},
        {"activation": "swiglu", "hidden": 200},
        {"kv_heads": 1, "head_dim": 10},
        {"vocab_size": 9000},  # the cross-entropy in chunks
        {"experts": {"number": 4, "active": 1, "every": 2}},
        {"experts": {"number": 4, "active": 2, "shared": 1, "hidden": 24}, "activation": "swiglu"},
    ],
)
def test_options_are_counted(changes: dict[str, Any]) -> None:
    settings = Model(**(SMALL | {"dim": 32, "heads": 2} | changes))
    found = training_flops(settings)
    assert found.matrices == pytest.approx(counted(settings), rel=0.01)
    assert found.attention * settings.context == pytest.approx(seen_by_hand(settings))


def test_attention_to_everything_is_what_products_of_whole_blocks_cost() -> None:
    """A CPU computes whole blocks of 256 queries, which a context of 48 does not fill."""
    settings = Model(**(SMALL | {"dim": 64, "heads": 2}))
    objective = Objective(Decoder(settings)).train()
    tokens = torch.randint(257, (BATCH, settings.context))
    with FlopCounterMode(display=False) as counter:
        objective(tokens, tokens).backward()
    found = training_flops(settings)
    assert found.palm == pytest.approx(counter.get_total_flops() / tokens.numel(), rel=0.01)


def test_gpt2_and_the_formula_of_palm() -> None:
    # 6 (124,439,808 - 1024 x 768) + 12 x 12 layers x 12 heads x 64 x 1024, with biases and norms
    found = training_flops(Model(**(preset_model("gpt2") | {"vocab_size": 50257})))
    assert found.palm == pytest.approx(855_166_464, rel=0.002)
    assert found.palm - found.total == 12 * 12 * 12 * 64 * 1023 / 2
