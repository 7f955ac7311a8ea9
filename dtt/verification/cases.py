"""What `dtt verify parallel` trains: a small model of the user's kind, in each layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dtt.config.model import AnyModel, Experts, HfModel, Rotary
from dtt.config.parallel import AXES, DATA_AXES, Parallel
from dtt.config.schema import Config
from dtt.data.loader import Batch
from dtt.data.windows import IGNORED

STEPS, SEQUENCES, CONTEXT, VOCABULARY, WIDTH = 20, 8, 32, 509, 16


@dataclass(frozen=True, eq=False)
class Case:
    """A way to train: ranks, their layout, sequences per forward, and what it may differ by."""

    name: str
    ranks: int
    parallel: Mapping[str, int | bool | str]
    micro: int
    loss: float = 1e-6
    """Largest relative difference of a loss."""
    gradient: float = 1e-5
    """Largest difference of a gradient, relative to the parameter's largest."""
    update: float = 5e-2
    """Largest difference of a parameter's update, relative to its norm: optimizers that divide by
    a gradient's own size, or orthogonalize it in bf16, enlarge what the gradients differ by."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of matrix products; the bounds are those of fp32."""


LOOSE = (1e-5, 1e-4)
"""Where products themselves are divided, sums have another order."""
ALONE = Case("one process", 1, {}, SEQUENCES)
CASES = (
    Case("accumulation", 1, {}, 2),
    Case("DDP", 2, {}, 4),
    Case("DDP, accumulation", 2, {}, 2),
    Case("FSDP2", 2, {"shard": 2}, 4),
    Case("FSDP2, not resharded", 2, {"shard": 2, "reshard": False}, 4),
    Case("TP", 2, {"tensor": 2}, 4, *LOOSE),
    Case("CP", 2, {"context": 2}, 4, *LOOSE),
    Case("PP, 1F1B", 2, {"pipeline": 2}, 2, *LOOSE),
    Case("PP, GPipe", 2, {"pipeline": 2, "schedule": "gpipe"}, 2, *LOOSE),
    Case("PP, interleaved", 2, {"pipeline": 2, "schedule": "interleaved"}, 2, *LOOSE),
    Case("PP, zero-bubble", 2, {"pipeline": 2, "schedule": "zero-bubble"}, 2, *LOOSE),
    Case("EP", 2, {"expert": 2}, 4, *LOOSE),
    Case("FSDP2, accumulation", 4, {"shard": 4}, 1),
    Case("HSDP", 4, {"replicate": 2, "shard": 2}, 2),
    Case("HSDP, accumulation", 4, {"replicate": 2, "shard": 2}, 1),
    Case("DDP x TP", 4, {"replicate": 2, "tensor": 2}, 2, *LOOSE),
    Case("FSDP2 x TP", 4, {"shard": 2, "tensor": 2}, 2, *LOOSE),
    Case("FSDP2 x CP", 4, {"shard": 2, "context": 2}, 2, *LOOSE),
    Case("FSDP2 x PP", 4, {"shard": 2, "pipeline": 2}, 2, *LOOSE),
    Case("TP x CP", 4, {"tensor": 2, "context": 2}, 4, *LOOSE),
    Case("TP x PP", 4, {"tensor": 2, "pipeline": 2}, 4, *LOOSE),
    Case("CP x PP", 4, {"context": 2, "pipeline": 2}, 4, *LOOSE),
    Case("FSDP2 x EP", 4, {"shard": 2, "expert": 2}, 2, *LOOSE),
    Case("EP x TP", 4, {"expert": 2, "tensor": 2}, 4, *LOOSE),
    Case("EP x PP", 4, {"expert": 2, "pipeline": 2}, 2, *LOOSE),
    Case("FSDP2 x TP x PP", 8, {"shard": 2, "tensor": 2, "pipeline": 2}, 2, *LOOSE),
    Case("FSDP2 x CP x TP", 8, {"shard": 2, "context": 2, "tensor": 2}, 2, *LOOSE),
)


THEIRS = {"replicate", "shard", "reshard", "tensor"}
"""What a model of `transformers` may go along."""


def cases_for(config: Config) -> list[Case]:
    """Return the cases for a configuration: those of experts for a mixture of them, and its own
    layout with two ranks along each axis that it uses."""
    found = [case for case in CASES if config.model.experts or "expert" not in case.parallel]
    if isinstance(config.model, HfModel):
        found = [case for case in found if set(case.parallel) <= THEIRS]
    own = _own(config)
    if own is not None and all(own.parallel != case.parallel for case in found):
        found.append(own)
    return sorted(found, key=lambda case: case.ranks)


def _own(config: Config) -> Case | None:
    settings = config.parallel
    axes = [name for name in AXES if getattr(settings, name) not in (None, 1)]
    if not axes:
        return None
    parallel: dict[str, int | bool | str] = dict.fromkeys(axes, 2)
    for name in ("reshard", "schedule", "offload"):
        if getattr(settings, name) != Parallel.model_fields[name].default:
            parallel[name] = getattr(settings, name)
    shares = 2 ** sum(name in DATA_AXES for name in axes)
    name = " x ".join(axes) + ", as configured"
    micro = SEQUENCES // shares // (2 if "pipeline" in axes and shares < SEQUENCES else 1)
    return Case(name, 2 ** len(axes), parallel, micro, *LOOSE)


def shrink(model: AnyModel) -> AnyModel:
    """Return a model of the same kind that takes milliseconds: every setting of it that decides
    what is computed is kept, sizes are not."""
    if isinstance(model, HfModel):
        from dtt.model.hf.settings import smaller

        return smaller(model, WIDTH, CONTEXT, VOCABULARY)
    grouped = model.heads // (model.kv_heads or model.heads)
    kv_heads = min(model.kv_heads or model.heads, 2)
    heads = kv_heads * min(grouped, 2)
    sizes: dict[str, Any] = {
        "dim": heads * WIDTH,
        "layers": 4 if model.layers > 1 else 1,
        "heads": heads,
        "kv_heads": kv_heads if model.kv_heads else None,
        "head_dim": None if model.head_dim is None else 2 * WIDTH,
        "hidden": None if model.hidden is None else 3 * heads * WIDTH,
        "experts": None if model.experts is None else _fewer(model.experts),
        "context": CONTEXT,
        "window": None if model.window is None else min(model.window, CONTEXT // 4),
        "vocab_size": VOCABULARY,
        "preset": None,
    }
    if isinstance(model.positions, Rotary):
        original = max(int(CONTEXT / model.positions.factor), 1)
        sizes["positions"] = model.positions.model_copy(update={"original_context": original})
    return model.model_copy(update=sizes)


def _fewer(experts: Experts) -> Experts:
    number = min(experts.number, 4)
    sizes = {
        "number": number,
        "active": min(experts.active, 2),
        "hidden": None if experts.hidden is None else 2 * WIDTH,
        "shared": min(experts.shared, 1),
        "every": min(experts.every, 2),
    }
    return experts.model_copy(update=sizes)


def small(config: Config, case: Case) -> Config:
    """Return what a case trains."""
    training: dict[str, Any] = {
        "engine": "dtt",  # which does all layouts
        "batch_size": SEQUENCES,
        "micro_batch_size": case.micro,
        "accumulation": None,
        "precision": case.precision,
        # PyTorch's split backward, which zero-bubble is made of, does not know compiled blocks.
        "compile": config.training.compile and case.parallel.get("schedule") != "zero-bubble",
    }
    parallel = type(config.parallel).model_validate(case.parallel)
    return config.model_copy(
        update={
            "model": shrink(config.model),
            "training": config.training.model_copy(update=training),
            "parallel": parallel,
        }
    )


def batch(step: int, rank: int, ranks: int) -> Batch:
    """Return a rank's share of a step: random tokens, a third of the rows in two documents."""
    draw = torch.Generator().manual_seed(step)
    rows = torch.randint(VOCABULARY, (SEQUENCES, CONTEXT + 1), generator=draw)
    targets, positions = rows[:, 1:].clone(), torch.arange(CONTEXT).repeat(SEQUENCES, 1)
    positions[::3, CONTEXT // 2 :] -= CONTEXT // 2
    targets[::3, CONTEXT // 2 - 1] = IGNORED
    targets[-1, 5:] = IGNORED  # ranks do not have equally many targets
    mine = slice(rank * SEQUENCES // ranks, (rank + 1) * SEQUENCES // ranks)
    count = int((targets != IGNORED).sum())
    return Batch(rows[mine, :-1], targets[mine], positions[mine], count, ())
