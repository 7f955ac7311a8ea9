"""The settings of a model as a config.json of `transformers` has them, in both directions."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from dtt.config.explain import error_lines
from dtt.config.model import Model
from dtt.errors import CheckpointError
from dtt.huggingface.families import ACTIVATIONS, FAMILIES, GPT2, MIXTRAL, QWEN3, QWEN3_MOE, Family
from dtt.huggingface.rotary import rotary_keys, rotary_settings

OURS_OF = {name: ours for ours, name in ACTIVATIONS.items()} | {"gelu_new": "gelu_tanh"}


def to_json(model: Model, family: Family, end_of_text: int | None, dtype: str) -> dict[str, Any]:
    """Return config.json of a model: what `transformers` 4 and 5 call things, where they differ.

    `end_of_text` begins and ends a text, and pads; None: unknown. `dtype` as in "float32".
    """
    plain = {
        "dim": model.dim,
        "layers": model.layers,
        "heads": model.heads,
        "kv_heads": model.kv_heads or model.heads,
        "head_dim": model.head_dim or model.dim // model.heads,
        "hidden": model.mlp_width,
        "context": model.context,
        "vocab_size": model.vocab_size,
        "norm_eps": model.norm_eps,
        "tied_head": model.tied_head,
        "init_std": model.init_std,
        "bias": model.bias,
    }
    found: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{theirs: plain[ours] for ours, theirs in family.keys.items()},
        **{key: allowed[0] for key, allowed in family.fixed.items()},
        **_activation(model, family),
        **rotary_keys(model),
        **_window(model, family),
        **_experts(model, family),
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if "attention_bias" in family.keys.values():
        found["mlp_bias"] = model.bias
    return found


def _activation(model: Model, family: Family) -> dict[str, Any]:
    if model.activation == "swiglu":
        return {}
    if family is not GPT2:
        return {"hidden_act": ACTIVATIONS[model.activation]}
    name = "gelu_new" if model.activation == "gelu_tanh" else ACTIVATIONS[model.activation]
    # Dropout is of training, and would be on when somebody else trains the model further.
    dropped = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout)
    return {"activation_function": name, **dropped}


def _window(model: Model, family: Family) -> dict[str, Any]:
    if len(family.needs["window"]) == 1:
        return {}
    found: dict[str, Any] = {"sliding_window": model.window}
    if family in (QWEN3, QWEN3_MOE):
        found |= {"use_sliding_window": model.window is not None, "max_window_layers": 0}
    if family is QWEN3:
        kind = "full_attention" if model.window is None else "sliding_attention"
        found["layer_types"] = [kind] * model.layers
    return found


def _experts(model: Model, family: Family) -> dict[str, Any]:
    experts = model.experts
    if experts is None:
        return {}
    weight = experts.balance_weight if experts.balance == "loss" else 0.0
    found = {"num_experts_per_tok": experts.active, "router_aux_loss_coef": weight}
    width = experts.hidden or model.mlp_width
    if family is MIXTRAL:
        return found | {"num_local_experts": experts.number, "intermediate_size": width}
    return found | {
        "num_experts": experts.number,
        "moe_intermediate_size": width,
        "decoder_sparse_step": experts.every,
        "norm_topk_prob": experts.normalize,
    }


def from_json(config: dict[str, Any], where: str) -> tuple[Model, Family]:
    """Return the settings that a config.json describes, and its architecture.

    `where` names the file. CheckpointError: it is of another architecture, lacks a key, or has a
    value that dtt's decoder does not compute; it says which.
    """
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        raise CheckpointError(
            f"{where}: model_type {config.get('model_type')!r} is no architecture that dtt has",
            f"it has {', '.join(FAMILIES)}",
        )
    values = dict(family.defaults) | config
    _refuse_others(values, family, where)
    missing = [key for key in family.keys.values() if key not in values]
    optional = {"head_dim", "num_key_value_heads", "initializer_range"}
    if missing := [key for key in missing if key not in optional]:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}", "restore the whole file")
    given = {ours: values.get(theirs) for ours, theirs in family.keys.items()}
    if given["init_std"] is None:
        del given["init_std"]
    if given["hidden"] is None:  # GPT-2's
        given["hidden"] = 4 * values[family.keys["dim"]]
    given |= {"norm": family.needs["norm"][0], "qk_norm": family.needs["qk_norm"][0]}
    given["bias"] = True if family is GPT2 else given.get("bias", False)
    given["activation"] = _activation_of(values, family, where)
    given["window"] = _window_of(values, family, where)
    given["experts"] = _experts_of(values, family, where)
    try:
        given["positions"] = {"name": "learned"}
        if family is not GPT2:
            given["positions"] = rotary_settings(values, where)
        return Model.model_validate(given), family
    except ValidationError as error:
        raise CheckpointError(f"{where}: " + "; ".join(error_lines(error, {}))) from None


def _refuse_others(values: dict[str, Any], family: Family, where: str) -> None:
    """Raise CheckpointError for what would be computed otherwise than dtt does."""
    allowed = {**family.fixed, "partial_rotary_factor": (1.0, None)}
    if "attention_bias" in family.keys.values():
        allowed["mlp_bias"] = (values["attention_bias"],)
        values.setdefault("mlp_bias", False)
    for key, known in allowed.items():
        if key in values and values[key] not in known:
            raise CheckpointError(
                f"{where}: {key} is {values[key]!r}, which dtt's decoder does not have",
                f"it has {' or '.join(repr(value) for value in known)}",
            )
    if values.get("quantization_config"):
        raise CheckpointError(
            f"{where}: the weights are quantized (quantization_config)", "take the original model"
        )


def _activation_of(values: dict[str, Any], family: Family, where: str) -> str:
    if "swiglu" in family.needs["activation"]:
        return "swiglu"
    key, usual = (
        ("activation_function", "gelu_new")
        if family is GPT2
        else (
            "hidden_act",
            "gelu_pytorch_tanh",
        )
    )
    name = values.get(key, usual)
    if name not in OURS_OF:
        raise CheckpointError(
            f"{where}: {key} is {name!r}, which dtt's decoder does not have",
            f"it has {', '.join(OURS_OF)}",
        )
    return OURS_OF[name]


def _window_of(values: dict[str, Any], family: Family, where: str) -> int | None:
    if len(family.needs["window"]) == 1:
        return None
    window: int | None = values.get("sliding_window")
    if family in (QWEN3, QWEN3_MOE) and not values.get("use_sliding_window"):
        window = None
    layers = values["num_hidden_layers"]
    kinds = values.get("layer_types")
    if window is not None and kinds is None and family is QWEN3:
        first = min(values.get("max_window_layers", 28), layers)
        kinds = ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    if window is not None and kinds and set(kinds) == {"full_attention"}:
        window = None
    elif window is not None and kinds and len(set(kinds)) > 1:
        raise CheckpointError(
            f"{where}: some layers have a window and others not (layer_types)",
            "dtt's decoder has one window in all blocks or none",
        )
    return window


def _experts_of(values: dict[str, Any], family: Family, where: str) -> dict[str, Any] | None:
    if family.needs["experts"] == ("none",):
        return None
    number = values.get("num_local_experts", values.get("num_experts"))
    for key, value in (
        ("num_local_experts" if family is MIXTRAL else "num_experts", number),
        ("num_experts_per_tok", values.get("num_experts_per_tok")),
    ):
        if value is None:
            raise CheckpointError(f"{where} lacks {key}", "restore the whole file")
    found: dict[str, Any] = {"number": number, "active": values["num_experts_per_tok"]}
    weight = values.get("router_aux_loss_coef")
    if weight is not None:
        found["balance_weight"] = weight
    if family is MIXTRAL:
        return found
    return found | {
        "hidden": values.get("moe_intermediate_size"),
        "every": values.get("decoder_sparse_step", 1),
        "normalize": values.get("norm_topk_prob", False),
    }
