"""What a user may set of a model that is there already: what says nothing of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dtt.config.model import Model, Rotary
from dtt.config.section import Section
from dtt.errors import ConfigError
from dtt.huggingface.choice import shown

TRAINING = {"preset", "dropout", "init_std"}
"""Settings of a model that a run may have otherwise than the folder that it starts from."""
TRAINING_EXPERTS = {"balance", "balance_weight", "bias_rate"}
FOLLOWS = {"kv_heads", "head_dim", "hidden", "vocab_size"}
"""Settings whose null stands for what follows from others."""


def with_given(theirs: Model, given: Model, where: str) -> Model:
    """Return the model of a folder with what `given`, a section of the user's, sets beside it.

    Only what was set counts. ConfigError names each setting that contradicts the folder. A shorter
    context does not, where positions are rotary: windows of training may be shorter.
    """
    wrong = list(_contradictions(theirs, given, _following(theirs), "model."))
    if wrong:
        what = f"{where} is another model: {', '.join(wrong)}"
        raise ConfigError(what, "leave these settings out")
    kept = given.model_fields_set & (TRAINING | {"context"}) - {"preset"}
    tree = theirs.model_dump(exclude={"preset"}) | {name: getattr(given, name) for name in kept}
    if theirs.experts is not None and given.experts is not None:
        ours = given.experts.model_fields_set & TRAINING_EXPERTS
        tree["experts"] |= {name: getattr(given.experts, name) for name in ours}
    return Model.model_validate(tree).model_copy(update={"preset": given.preset})


def _following(model: Model) -> dict[str, Any]:
    """What null stands for, by dotted name."""
    experts = model.experts
    return {
        "model.kv_heads": model.kv_heads or model.heads,
        "model.head_dim": model.head_dim or model.dim // model.heads,
        "model.hidden": model.mlp_width,
        "model.experts.hidden": experts and (experts.hidden or model.mlp_width),
    }


def _contradictions(
    theirs: Section, given: Section, following: dict[str, Any], prefix: str
) -> Iterator[str]:
    """Yield each setting of `given` that was set, and is not that of the folder."""
    for name in sorted(given.model_fields_set - TRAINING - TRAINING_EXPERTS):
        path, wanted = prefix + name, getattr(given, name)
        have = following.get(path, getattr(theirs, name))
        if wanted is None and name in FOLLOWS:
            continue
        if isinstance(wanted, Section) and type(wanted) is type(have):
            yield from _contradictions(have, wanted, following, f"{path}.")
        elif path == "model.context" and isinstance(getattr(theirs, "positions", None), Rotary):
            if wanted > have:
                yield f"{path} {wanted} (it has at most {have})"
        elif wanted != have:
            yield f"{path} {_words(wanted)} (it has {_words(have)})"


def _words(value: Any) -> str:
    """A section by its name, if it has one."""
    if isinstance(value, Section):
        return str(getattr(value, "name", "on"))
    return "none" if value is None else shown(value)
