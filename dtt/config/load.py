"""From layers of settings to a Config: defaults < implied < files in order < command line.

Nothing is validated before the layers are merged, so that a value in a file that is wrong only
together with another can be mended by a flag.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from dtt.config.explain import error_lines
from dtt.config.familiar import in_our_words
from dtt.config.fields import Leaf, is_optional, leaves, subsection, union_members
from dtt.config.layers import Layer, file_layers, preset_layers
from dtt.config.schema import Config
from dtt.config.section import Section
from dtt.config.sources import source_label
from dtt.config.yaml_text import Tree, parse_inline, read_yaml, write_yaml
from dtt.errors import ConfigError

SCHEMA_FILE = "config.schema.json"
# Leaves whose text may hold a newline or tab, written \n and \t on a command line.
ESCAPED = ("data.source.separator", "data.source.template", "sample.prompts")

Overrides = Mapping[str, tuple[str, str]]


def load_config(
    files: Sequence[str] = (),
    overrides: Overrides | None = None,
    implied: Mapping[str, Any] | None = None,
    dataset: str | None = None,
) -> Config:
    """Merge all layers and validate the result once.

    `files`: YAML files or names of presets, the later ones win. `dataset`: a YAML file with the
    keys of the `data` section, above them. `overrides`: {dotted path: (flag as typed, text)},
    above both. `implied`: sections that hold where no layer says anything about them. The name of
    the result is never null. ConfigError: a line for each thing that is wrong, with file:line or
    flag.
    """
    layers = [layer for name in files for layer in file_layers(name)]
    if dataset is not None:
        layers.append(_dataset_layer(dataset))
    layers.append(_override_layer(overrides or {}))
    said = {key for layer in layers for key in layer.tree}
    # What is started from has a tokenizer of its own.
    said |= {"tokenizer"} if "init_from" in said else set()
    lowest = {key: value for key, value in (implied or {}).items() if key not in said}

    merged = _fold([Layer(lowest), *layers])
    try:
        config = Config.model_validate(merged.tree)
    except ValidationError as error:
        raise ConfigError("\n".join(error_lines(error, merged.origins))) from None
    return named(config, files)


def named(config: Config, files: Sequence[str] = ()) -> Config:
    """The configuration with a name: its own, or one from its files or its corpus."""
    if config.name is not None:
        return config
    return config.model_copy(update={"name": _default_name(files, config)})


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; load_config reads it back equal."""
    head = f"# yaml-language-server: $schema={SCHEMA_FILE}\n"
    tree = config.model_dump(mode="json")
    if config.data.mixture:
        del tree["data"]["source"]
    return head + write_yaml(tree)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors."""
    schema = Config.model_json_schema()
    text = {"type": "string"}
    schema["properties"]["extends"] = {
        "anyOf": [text, {"type": "array", "items": text}],
        "description": "Files (relative to this one) or presets that this file builds on.",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def parse_value(leaf: Leaf | None, text: str) -> Any:
    """A value as typed on a command line; what does not fit is left as text, for validation."""
    arguments = get_args(leaf.annotation) if leaf else ()
    if leaf is None or (text in ("null", "none", "None") and type(None) in arguments):
        return text if leaf is None else None
    is_text = not leaf.is_list and not leaf.is_mapping and str in (leaf.annotation, *arguments)
    if text.startswith(("[", "{")) and not is_text:
        return parse_inline(text)
    if leaf.path in ESCAPED:
        text = text.replace("\\n", "\n").replace("\\t", "\t")
    if leaf.is_list and str in arguments:
        # "Once, there" is one text with a comma in it, "a,b" is two.
        return re.split(r",(?! )", text) if text else []
    if leaf.is_list:
        return [_number(item) for item in text.split(",")] if text else []
    if {int, float} & {leaf.annotation, *arguments}:
        return _number(text)
    return text


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _fold(layers: Iterable[Layer]) -> Layer:
    """All layers in one; the later ones win, and a preset replaces the model below it."""
    result = Layer({})
    for layer in map(in_our_words, layers):
        model = layer.tree.get("model")
        preset = model.get("preset") if isinstance(model, dict) else None
        if isinstance(preset, str):
            where = layer.origins.get(("model", "preset"), "model.preset")
            base = _fold(preset_layers(preset, f"{where}: "))
            kept = {key: place for key, place in result.origins.items() if key[0] != "model"}
            new = {key: place for key, place in base.origins.items() if key[0] == "model"}
            tree = {**result.tree, "model": base.tree.get("model", {})}
            result = Layer(tree, {**kept, **new})
        result = _without_other_corpora(result, layer)
        tree = _merge(Config, result.tree, layer.tree)
        result = Layer(tree, {**result.origins, **layer.origins})
    return result


def _without_other_corpora(below: Layer, above: Layer) -> Layer:
    """`below` without the mixture that a source in `above` replaces, or the other way round."""
    said = above.tree.get("data")
    said = said if isinstance(said, dict) else {}
    if said.get("mixture") and said.get("source"):
        where = above.origins.get(("data", "mixture"), "data.mixture")
        raise ConfigError(
            f"{where}: data.mixture and data.source are both given",
            "leave one of them out, or make the source a part of the mixture",
        )
    data = below.tree.get("data")
    gone = "mixture" if said.get("source") else "source" if said.get("mixture") else None
    if gone is None or not isinstance(data, dict):
        return below
    left = {key: value for key, value in data.items() if key != gone}
    return Layer({**below.tree, "data": left}, below.origins)


def _merge(section: type[Section] | None, below: Tree, above: Tree) -> Tree:
    """`below` with the keys of `above` over it; naming another union member drops the old one's."""
    merged = dict(below)
    for key, value in above.items():
        field = section.model_fields.get(key) if section else None
        inner, members = (subsection(field), union_members(field)) if field else (None, {})
        if value is None and (inner or members) and field and not is_optional(field):
            value = {}  # a section whose keys are all commented out
        if not isinstance(value, dict):
            merged[key] = value
            continue
        old = merged.get(key)
        old = {} if old is None else old
        if not isinstance(old, dict):
            continue  # a section that is not one stays, for validation to name its line
        if field and members:
            current = old.get("name", field.get_default().name)
            chosen = value.get("name", current)
            inner = members.get(chosen) if isinstance(chosen, str) else None
            old = {**(old if chosen == current else {}), "name": chosen}
        merged[key] = _merge(inner, old, value)
    return merged


def _override_layer(overrides: Overrides) -> Layer:
    layer = Layer({})
    for path, (flag, text) in overrides.items():
        key = tuple(path.split("."))
        *parents, last = key
        node = layer.tree
        for parent in parents:
            node = node.setdefault(parent, {})
        try:
            node[last] = parse_value(leaves().get(path), text)
        except ValueError as error:
            raise ConfigError(f"{flag}: {error}") from None
        layer.origins[key] = flag
    return layer


def _dataset_layer(name: str) -> Layer:
    text = read_yaml(Path(name), name)
    origins = {("data", *key): f"{name}:{line}" for key, line in text.lines.items()}
    if "data" in text.tree:
        raise ConfigError(
            f"{origins['data', 'data']}: a dataset file holds the keys of the data section",
            f"leave out `data:`, or give the file with -c {name}",
        )
    return Layer({"data": text.tree}, origins)


def _default_name(files: Sequence[str], config: Config) -> str:
    """The last file's name; else the first text's; else the source's."""
    if files:
        candidates = [Path(files[-1]).stem]
    elif config.data.source.name in ("text", "records"):
        path = Path(config.data.source.path[0])
        candidates = [path.stem, *(parent.name for parent in path.absolute().parents)]
    else:
        candidates = [source_label(config.data.source)]
    clean = (re.sub(r"[^\w.-]+", "-", name).strip("-.") for name in candidates)
    return next((name for name in clean if name), "run")
