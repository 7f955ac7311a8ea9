"""What a user may set of a model that is there already: what says nothing of its weights."""

from __future__ import annotations

from typing import Any

from dtt.config.model import Model, Rotary
from dtt.errors import ConfigError
from dtt.huggingface.choice import shown
from dtt.huggingface.rotary import rotary_keys

TRAINING = ("preset", "dropout", "init_std")
"""Settings of a model that say nothing of its weights: a run may have others than the folder."""
TRAINING_EXPERTS = ("balance", "balance_weight", "bias_rate")


def with_given(theirs: Model, given: Model, where: str) -> Model:
    """Return the model of a folder with what `given`, a section of the user's, sets beside it.

    Only what was set counts. ConfigError names each setting that contradicts the folder. A shorter
    context is none, where positions are rotary: windows of training may be shorter.
    """
    said = given.model_fields_set
    wanted, have = _effective(given), _effective(theirs)
    wrong = []
    for name in sorted(said - set(TRAINING)):
        if name == "context" and isinstance(theirs.positions, Rotary):
            if given.context > theirs.context:
                wrong.append(f"model.context {given.context} (it has at most {theirs.context})")
        elif name in have and wanted[name] is not None and wanted[name] != have[name]:
            wrong.append(f"model.{name} {_value(wanted[name])} (it has {_value(have[name])})")
    if wrong:
        raise ConfigError(
            f"{where} is another model: {', '.join(wrong)}", "leave these settings out"
        )
    kept = [name for name in (*TRAINING, "context") if name in said]
    tree = theirs.model_dump() | {name: getattr(given, name) for name in kept}
    if theirs.experts is not None and given.experts is not None:
        set_there = given.experts.model_fields_set
        tree["experts"] |= {
            name: getattr(given.experts, name) for name in TRAINING_EXPERTS if name in set_there
        }
    tree.pop("preset", None)  # it would be expanded again
    made = Model.model_validate(tree)
    return made.model_copy(update={"preset": given.preset})


def _effective(model: Model) -> dict[str, Any]:
    """The settings that say what is computed, with what null stands for."""
    found = model.model_dump(exclude={*TRAINING})
    found["kv_heads"] = model.kv_heads or model.heads
    found["head_dim"] = model.head_dim or model.dim // model.heads
    found["hidden"] = model.mlp_width
    if isinstance(model.positions, Rotary):
        width = found["head_dim"]
        # Factors that a scaling does not read are no difference.
        found["positions"] = rotary_keys(model.model_copy(update={"head_dim": width}))
    if model.experts is not None:
        experts = model.experts
        found["experts"] = experts.model_dump(exclude={*TRAINING_EXPERTS})
        found["experts"]["hidden"] = experts.hidden or model.mlp_width
        if experts.every == 1:  # there is no dense MLP
            found["hidden"] = found["experts"]["hidden"]
    return found


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items() if inner is not None)
    return shown(value)
