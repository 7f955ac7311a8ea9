"""Which architecture of `transformers` a model of dtt is."""

from __future__ import annotations

from typing import Any

from dtt.config.model import Model
from dtt.errors import ConfigError
from dtt.huggingface.families import FAMILIES, Family


def facts(model: Model) -> dict[str, Any]:
    """Return what families differ in: the words and values of `Family.needs`."""
    experts = model.experts
    found: dict[str, Any] = {
        "positions": model.positions.name,
        "norm": model.norm,
        "activation": model.activation,
        "bias": model.bias,
        "qk_norm": model.qk_norm,
        "kv_heads": "as heads" if model.kv_heads in (None, model.heads) else model.kv_heads,
        "head_dim": "dim / heads"
        if model.head_dim is None or model.head_dim * model.heads == model.dim
        else model.head_dim,
        "dim": model.dim if model.dim % model.heads else "a multiple of heads",
        "window": model.window is not None,
        "experts": "none",
    }
    if experts is not None:
        found |= {
            "experts": "all blocks" if experts.every == 1 else "some blocks",
            "experts.scoring": experts.scoring,
            "experts.balance": experts.balance,
            "experts.shared": experts.shared,
            "experts.normalize": experts.normalize,
        }
    return found


def family_of(model: Model) -> Family:
    """Return the architecture that computes what these settings say. ConfigError: none does; it
    names the settings in the way of the nearest one, and what can be exported."""
    found = facts(model)
    lacking: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        lacking[family.model_type] = [
            f"model.{name} {shown(found[name])} (it has {' or '.join(map(shown, allowed))})"
            for name, allowed in family.needs.items()
            if name in found and found[name] not in allowed
        ]
        if not lacking[family.model_type]:
            return family
    # Experts are most of a model: one that has them is not near one that has none.
    nearest = min(
        lacking,
        key=lambda name: sum(3 if s.startswith("model.experts ") else 1 for s in lacking[name]),
    )
    known = "; ".join(family.summary for family in FAMILIES.values())
    raise ConfigError(
        f"no stock architecture is this model: {FAMILIES[nearest].architecture} comes nearest, "
        f"but for {', '.join(lacking[nearest])}",
        f"what can be exported: {known}; --to safetensors always works",
    )


def shown(value: Any) -> str:
    """Return a value as people write it."""
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
