"""Other people's words for the settings of the model, put into dtt's.

`model: {name: gpt2-small, hidden_size: 768, num_attention_heads: 12}` names a preset and speaks
as `transformers` does: it is dtt's decoder with that preset's settings, and these changes.
"""

from __future__ import annotations

from typing import Any, get_args

from dtt.config.explain import did_you_mean
from dtt.config.layers import Layer, preset_names
from dtt.config.model import HfModel, Model
from dtt.errors import ConfigError

NAMES = tuple(get_args(kind.model_fields["name"].annotation)[0] for kind in (Model, HfModel))
WORDS = {
    "hidden_size": "dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "hidden",
    "max_position_embeddings": "context",
    "tie_word_embeddings": "tied_head",
    "initializer_range": "init_std",
}
"""Settings of the decoder as `transformers` calls them."""


def in_our_words(layer: Layer) -> Layer:
    """Return a layer whose section `model` has dtt's names; ConfigError: a name is unknown, or a
    setting is there twice."""
    model = layer.tree.get("model")
    if not isinstance(model, dict):
        return layer
    place = layer.origins.get(("model", "name"), "model.name")
    renamed = _renamed(model, f"{place}: ")
    if not renamed:
        return layer
    for old, new in renamed.items():
        if new in model:
            where = layer.origins.get(("model", old), "model")
            raise ConfigError(f"{where}: {old} and {new} are the same setting", "leave one out")
    tree = {renamed.get(key, key): value for key, value in model.items()}
    origins = {
        ("model", renamed.get(key[1], key[1]), *key[2:])
        if len(key) > 1 and key[0] == "model"
        else key: place
        for key, place in layer.origins.items()
    }
    return Layer({**layer.tree, "model": tree}, origins)


def _renamed(model: dict[str, Any], where: str) -> dict[str, str]:
    """Return what keys of the section are called here, where that is otherwise."""
    name = model.get("name")
    if name == HfModel.model_fields["name"].default:
        return {}
    found = {old: new for old, new in WORDS.items() if old in model}
    if not isinstance(name, str) or name in NAMES:
        return found
    if name not in preset_names():
        known = did_you_mean(name, [*NAMES, *preset_names()])
        raise ConfigError(
            f"{where}unknown model {name!r}{known}",
            "give decoder, hf (with architecture: gpt2, llama, ...), or a preset (`dtt config "
            "presets` lists them)",
        )
    return found | {"name": "preset"}
