"""From what people say of a model of `transformers` to its complete settings, and to its config.

Complete settings need neither the folder nor the Hub that they may have come from, and no default
of `transformers`: a checkpoint that has them is enough to build the model again.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from dtt.config.explain import did_you_mean
from dtt.config.model import HfModel
from dtt.errors import ConfigError
from dtt.model.hf.quiet import quiet

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
"""What every architecture has by one of its names."""
OTHERS = {
    *("model_type", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype"),
    *("_name_or_path", "_attn_implementation", "use_cache", "vocab_size", "pad_token_id"),
    *("bos_token_id", "eos_token_id", "decoder_start_token_id", "task_specific_params"),
}
"""Keys of a config.json that say nothing of what is computed, or that dtt has itself."""
OLDER = {"rope_theta", "rope_scaling", "head_dim"}
"""Settings that `transformers` takes and then calls otherwise."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def require_transformers() -> None:
    """Raise ConfigError unless `transformers` is installed."""
    if find_spec("transformers") is None:
        raise ConfigError(
            "model.name hf needs the Python package 'transformers'", "pip install 'dtt[hf]'"
        )


def complete(
    asked: HfModel,
    architecture: str,
    found: Mapping[str, Any] | None = None,
    where: str = "model",
    *,
    with_weights: bool = False,
) -> HfModel:
    """Return the settings with all that follows from them, for the model_type `architecture`.

    `found` is what a config.json (at `where`) says; `asked.settings` are over it. `with_weights`:
    the sizes of `found` are those of weights, and hold where nothing else is asked; without it the
    vocabulary is the tokenizer's, and positions reach as far as the context. ConfigError: there is
    no such architecture or setting, or dtt cannot train such a model.
    """
    kind = _config_class(architecture)
    names: dict[str, str] = kind.attribute_map
    _refuse_unknown(asked.settings, kind)
    theirs = {names.get(key, key): value for key, value in asked.settings.items()}
    given = {names.get(k, k): v for k, v in (found or {}).items() if k not in OTHERS} | theirs
    size = asked.vocab_size or theirs.pop("vocab_size", None)
    if size is None and with_weights and found is not None:
        size = found.get(names.get("vocab_size", "vocab_size"))
    positions = names.get("max_position_embeddings", "max_position_embeddings")
    context = asked.context
    if not with_weights and positions not in theirs and hasattr(kind, positions):
        given[positions] = context
    config = _made(kind, {**given, **_own_keys(kind, size, asked.dropout)}, where)
    _refuse_kinds(config, architecture)
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and most < context:
        if "context" in asked.model_fields_set or not with_weights:
            raise ConfigError(
                f"model.context {context} is longer than the model's positions ({most})",
                "set a shorter model.context",
            )
        context = most
    elif isinstance(most, int) and with_weights and "context" not in asked.model_fields_set:
        context = most
    return asked.model_copy(
        update={
            "architecture": architecture,
            "settings": _plain(config),
            "context": context,
            "vocab_size": size,
        }
    )


def smaller(settings: HfModel, width: int, context: int, vocab_size: int) -> HfModel:
    """Return complete settings of the same architecture with few, narrow heads and two layers."""
    theirs = dict(settings.settings)
    shared = theirs.get("num_key_value_heads") or settings.heads
    heads = min(settings.heads, 4) if shared == settings.heads else 4
    theirs |= {"num_hidden_layers": 2, "num_attention_heads": heads, "hidden_size": heads * width}
    small = {
        "num_key_value_heads": heads if shared == settings.heads else 2,
        "head_dim": width,
        "intermediate_size": 3 * heads * width,
        "max_position_embeddings": context,
    }
    theirs |= {key: value for key, value in small.items() if theirs.get(key) is not None}
    theirs.pop("layer_types", None)
    made = settings.model_copy(
        update={"settings": theirs, "context": context, "vocab_size": vocab_size}
    )
    config_of(made)
    return made


def config_of(settings: HfModel) -> Any:
    """Return the config of `transformers` that complete settings describe."""
    require_transformers()
    assert settings.architecture is not None and settings.vocab_size is not None
    kind = _config_class(settings.architecture)
    names: dict[str, str] = kind.attribute_map
    given = {names.get(key, key): value for key, value in settings.settings.items()}
    own = _own_keys(kind, settings.vocab_size, settings.dropout)
    return _made(kind, {**given, **own}, "model")


def _config_class(architecture: str) -> Any:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return CONFIG_MAPPING[architecture]
    known = did_you_mean(architecture, sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    raise ConfigError(
        f"model.architecture: transformers has no causal language model {architecture!r}{known}",
        "give a model_type (gpt2, llama, ...), or a folder or ORG/NAME with a config.json",
    )


def _own_keys(kind: Any, vocab_size: int | None, dropout: float) -> dict[str, Any]:
    """What dtt decides: the vocabulary, no padding token, and what is dropped in training."""
    # Tokens that begin and end a text are the tokenizer's: here they must only be in range.
    own: dict[str, Any] = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    own["use_cache"] = True
    own |= dict.fromkeys(_dropouts(kind), dropout)
    own |= {key: 0.0 for key in own if "layerdrop" in key}
    if vocab_size is not None:
        own[kind.attribute_map.get("vocab_size", "vocab_size")] = vocab_size
    return own


def _usual(kind: Any) -> dict[str, Any]:
    """Return the settings of an architecture that is asked for nothing."""
    with quiet():  # some are not content with themselves
        found: dict[str, Any] = kind().to_dict()
    return found


def _dropouts(kind: Any) -> list[str]:
    return [
        key
        for key, value in _usual(kind).items()
        if ("drop" in key and isinstance(value, int | float) and not isinstance(value, bool))
    ]


def _refuse_unknown(given: Mapping[str, Any], kind: Any) -> None:
    known = {*_usual(kind), *kind.attribute_map, *SIZES, *OLDER}
    for key in given:
        if key not in known:
            raise ConfigError(
                f"model.settings.{key}: {kind.model_type} has no such setting"
                f"{did_you_mean(key, sorted(known))}"
            )
        if key in _dropouts(kind):
            raise ConfigError(
                f"model.settings.{key}: dtt sets it, so that a run can be repeated",
                "set model.dropout, which holds for all of the model",
            )
        if key in OTHERS - {"vocab_size"}:
            raise ConfigError(f"model.settings.{key}: dtt sets it", "leave it out")


def _made(kind: Any, given: Mapping[str, Any], where: str) -> Any:
    try:
        return kind(**given)
    except Exception as error:  # checks of all sorts, made by classes of all sorts
        text = " ".join(str(error).split())[:300]
        raise ConfigError(f"{where}: {kind.model_type}: {text}", "correct model.settings") from None


def _refuse_kinds(config: Any, architecture: str) -> None:
    """Raise ConfigError for models that dtt would train otherwise than they are meant."""
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"model.architecture: {architecture} is not a decoder alone")
    inner = config.get_text_config()
    if inner is not config or type(config).sub_configs:
        part = f"the part that is of text: model.architecture {inner.model_type}"
        raise ConfigError(
            f"model.architecture: {architecture} is of text and other things",
            f"take {part if inner is not config else 'another architecture'}",
        )
    if any((getattr(config, key, None) or 0) > 1 for key in EXPERTS):
        raise ConfigError(
            f"model.architecture: {architecture} has experts, which dtt balances in its own "
            "decoder only",
            "use it (model.experts; presets mixtral-8x7b and qwen3-30b-a3b)",
        )
    if getattr(config, "quantization_config", None):
        raise ConfigError("the weights are quantized", "take the original model")
    for key in SIZES:
        if not isinstance(getattr(config, key, None), int):
            raise ConfigError(f"model.architecture: {architecture} has no {key}")


def _plain(config: Any) -> dict[str, Any]:
    """Return what a config says as config.json has it, without what dtt has itself."""
    data = dict(config.to_diff_dict())
    dropouts = _dropouts(type(config))
    for ours, theirs in config.attribute_map.items():
        if theirs in data:
            data[ours] = data.pop(theirs)
    data |= {key: getattr(config, key) for key in SIZES}
    # A config.json may have more than its architecture: that is of other times, or of other code.
    known = {*_usual(type(config)), *config.attribute_map, *SIZES} - OTHERS - {*dropouts}
    return {key: value for key, value in sorted(data.items()) if key in known}
