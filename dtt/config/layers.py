"""Configuration files and the packaged presets, each as a list of layers.

A preset is a YAML file in the folder presets/; its name will do wherever a file is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dtt.config.explain import did_you_mean
from dtt.config.yaml_text import Key, Tree, read_yaml
from dtt.errors import ConfigError

FOLDER = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Layer:
    """Settings from one place; `origins` says which line or flag set each key."""

    tree: Tree
    origins: dict[Key, str] = field(default_factory=dict)


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; what cannot be a name is none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def preset_names() -> list[str]:
    """The names of the packaged presets, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def preset_summary(name: str) -> str:
    """What a preset is: the comment on its first line."""
    with (FOLDER / f"{name}.yaml").open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


def file_layers(name: str) -> list[Layer]:
    """A file's layers, lowest first: those that it extends, then itself.

    `name` is a path, or a preset's name when no such file exists. ConfigError: neither exists, the
    file cannot be read, or files extend each other in a circle.
    """
    return _layers(name, Path(), "", ())


def preset_layers(name: str, where: str) -> list[Layer]:
    """As file_layers, for a preset only; `where` names the place that asks for it."""
    if name not in preset_names():
        known = did_you_mean(name, preset_names()) or f" (known: {', '.join(preset_names())})"
        raise ConfigError(f"{where}unknown preset {name!r}{known}")
    return _layers(name, FOLDER, where, ())


def preset_model(name: str) -> Tree:
    """The model settings of a preset. ConfigError if there is none of that name."""
    tree: Tree = {}
    for layer in preset_layers(name, "model.preset: "):
        tree |= layer.tree.get("model") or {}
    return tree


def _layers(name: str, folder: Path, where: str, open_files: tuple[Path, ...]) -> list[Layer]:
    path = folder / name
    if not exists(path) and name in preset_names():
        path = FOLDER / f"{name}.yaml"
    shown = f"preset {path.stem}" if path.parent == FOLDER else str(path)
    if not exists(path):
        hint = did_you_mean(name, preset_names())
        raise ConfigError(f"{where}{shown}: no such file or preset{hint}")
    if path.resolve() in open_files:
        circle = " -> ".join(item.name for item in (*open_files, path))
        raise ConfigError(f"{where}files extend each other in a circle: {circle}")

    text = read_yaml(path, shown)
    origins = {key: f"{shown}:{line}" for key, line in text.lines.items()}
    extends = text.tree.pop("extends", None) or []
    bases = [extends] if isinstance(extends, str) else extends
    place = f"{origins.get(('extends',), shown)}: extends: "
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{place}should be a file or preset, or a list of them, got {extends!r}")
    below = [
        layer
        for base in bases
        for layer in _layers(base, path.parent, place, (*open_files, path.resolve()))
    ]
    return [*below, Layer(text.tree, origins)]
