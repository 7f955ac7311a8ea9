"""Rotary positions in a config.json: `rope_theta` and `rope_scaling`, or `rope_parameters`."""

from __future__ import annotations

import math
from typing import Any

from dtt.config.model import Model, Rotary
from dtt.errors import CheckpointError

SCALINGS = ("linear", "yarn", "llama3")
"""Those that `transformers` has under the same name and with the same meaning."""


def rotary_keys(model: Model) -> dict[str, Any]:
    """Return what config.json says of rotary positions, in the old spelling and in the new one;
    nothing for others.

    dtt's `ntk` is a larger base, and is written as one. (`dynamic` of `transformers` is another
    thing: its base depends on the length of the text.)
    """
    rotary = model.positions
    if not isinstance(rotary, Rotary):
        return {}
    theta, scaling = rotary.theta, None
    if rotary.scaling == "ntk":
        width = model.head_dim or model.dim // model.heads
        theta *= rotary.factor ** (width / (width - 2))
    elif rotary.scaling != "none":
        scaling = {"rope_type": rotary.scaling, "factor": rotary.factor}
        if rotary.scaling in ("yarn", "llama3"):
            scaling["original_max_position_embeddings"] = rotary.original_context
        if rotary.scaling == "yarn":
            scaling |= {"beta_fast": rotary.beta_fast, "beta_slow": rotary.beta_slow}
        if rotary.scaling == "llama3":
            scaling["low_freq_factor"] = rotary.low_freq_factor
            scaling["high_freq_factor"] = rotary.high_freq_factor
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
    }


def rotary_settings(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the settings of `Rotary` that a config.json describes, in either spelling.

    CheckpointError: a kind of scaling, or a figure of one, that dtt does not have.
    """
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    theta = rope.get("rope_theta", values.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    found: dict[str, Any] = {"name": "rotary", "theta": theta}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unknown(where, "partial_rotary_factor", rope["partial_rotary_factor"])
    if kind == "default":
        return found
    if kind not in SCALINGS:
        raise _unknown(where, "rope_type", kind)
    if rope.get("factor") is None:
        raise CheckpointError(f"{where}: {kind} scaling lacks its factor", "restore the whole file")
    found |= {"scaling": kind, "factor": rope["factor"]}
    if kind != "linear":
        original = rope.get("original_max_position_embeddings")
        found["original_context"] = original or values["max_position_embeddings"]
    for key in {"yarn": ("beta_fast", "beta_slow"), "llama3": LLAMA3}.get(kind, ()):
        if rope.get(key) is not None:
            found[key] = rope[key]
    if kind == "yarn":
        _refuse_other_yarn(rope, where)
    return found


LLAMA3 = ("low_freq_factor", "high_freq_factor")


def _refuse_other_yarn(rope: dict[str, Any], where: str) -> None:
    """dtt has YaRN with the temperature of its paper, and whole dimensions as its borders."""
    usual = 0.1 * math.log(rope["factor"]) + 1.0
    factor = rope.get("attention_factor")
    if factor is not None and not math.isclose(factor, usual, rel_tol=1e-6):
        raise _unknown(where, "attention_factor", factor)
    for key, plain in (("truncate", True), ("mscale", None), ("mscale_all_dim", None)):
        if rope.get(key, plain) != plain:
            raise _unknown(where, key, rope[key])


def _unknown(where: str, key: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"{where}: rotary positions with {key} {value!r}, which dtt's decoder does not have",
        f"it has rope_type default, {', '.join(SCALINGS)}",
    )
