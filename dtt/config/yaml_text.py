"""Reading YAML with the line of every key, and writing it so that it reads back equal.

Scalars are those of YAML 1.2: 3e-4 is a number, `no` and `1:30` are text. (PyYAML follows YAML 1.1,
where 3e-4 is text, `no` is false and 1:30 is 90.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dtt.errors import ConfigError

FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$|0o[0-7]+$|0x[0-9a-fA-F]+$")
BOOLEAN = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
NULL = re.compile(r"(?:~|null|Null|NULL|)$")
# A configuration is small and flat; these end files that refer to themselves or multiply.
MOST_KEYS, DEEPEST = 10_000, 20
PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")

Key = tuple[str, ...]
Tree = dict[str, Any]


@dataclass(frozen=True)
class YamlText:
    """The keys and values of a YAML text, and the line (from 1) on which each key stands."""

    tree: Tree = field(default_factory=dict)
    lines: dict[Key, int] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """YAML 1.1's quotes, too, so that other readers see the same values."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


for _name, _pattern, _first in (
    ("bool", BOOLEAN, "tTfF"),
    ("float", FLOAT, "-+0123456789."),
    ("int", INTEGER, "-+0123456789"),
    ("null", NULL, ["~", "n", "N", ""]),
    ("merge", re.compile(r"<<$"), "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, list(_first))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
_Dumper.add_representer(
    list,
    lambda dumper, items: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", items, not any(isinstance(item, dict) for item in items)
    ),
)


class _ManifestDumper(_Dumper):
    """A text of several lines stands on several lines; a list has a line for each item."""


_ManifestDumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, "|" if "\n" in text else None
    ),
)
_ManifestDumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, False)
)


def read_yaml(path: Path, name: str) -> YamlText:
    """Read a file of sections; ConfigError names it `name` and says on which line it is wrong.

    Duplicate keys, tags and unreadable files are errors; an empty file has no keys.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{name}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name}: not a UTF-8 text file") from None
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str) -> YamlText:
    """As read_yaml, from the text itself."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None or node.tag == "tag:yaml.org,2002:null":
            return YamlText()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{name}:1: expected sections (key: value)")
        result = YamlText()
        result.tree.update(_convert(node, (), loader, result.lines, name))
        return result
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{name}:{line}: invalid YAML: {problem}") from None
    except (RecursionError, ValueError):
        raise ConfigError(f"{name}: invalid YAML: not a configuration") from None


def parse_inline(text: str) -> Any:
    """The value of one line of YAML, such as [0.9, 0.95]; ValueError when it is none."""
    try:
        return parse_yaml(f"value: {text}", "").tree["value"]
    except ConfigError:
        raise ValueError(f"cannot read {text!r} as a YAML list or mapping") from None


def write_yaml(tree: Tree) -> str:
    """YAML text of plain values that parse_yaml reads back equal; a list stands on one line, one of
    sections on several."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def write_manifest(tree: Tree) -> str:
    """YAML text of plain values for other programs, whichever YAML they read, and for people."""
    return yaml.dump(
        tree, Dumper=_ManifestDumper, sort_keys=False, allow_unicode=True, width=10_000
    )


def _convert(node: yaml.Node, at: Key, loader: _Loader, lines: dict[Key, int], name: str) -> Any:
    """The plain value of a node; the line of every key below it goes into `lines`."""
    if len(at) > DEEPEST or len(lines) > MOST_KEYS:
        raise ConfigError(f"{name}: nested too deeply or too large for a configuration")
    if isinstance(node, yaml.ScalarNode):
        return loader.construct_object(node)
    if node.tag not in PLAIN_TAGS:
        raise ConfigError(f"{name}:{node.start_mark.line + 1}: unknown YAML tag {node.tag}")
    if isinstance(node, yaml.SequenceNode):
        values = []
        for index, item in enumerate(node.value):
            place = (*at, str(index))
            lines[place] = item.start_mark.line + 1
            values.append(_convert(item, place, loader, lines, name))
        return values
    assert isinstance(node, yaml.MappingNode)
    _refuse_duplicates(node, at, name)
    loader.flatten_mapping(node)
    tree: Tree = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{name}:{key.start_mark.line + 1}: a key must be a single word")
        place = (*at, key.value)
        lines[place] = key.start_mark.line + 1
        tree[key.value] = _convert(value, place, loader, lines, name)
    return tree


def _refuse_duplicates(node: yaml.MappingNode, at: Key, name: str) -> None:
    first: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and key.value in first:
            path = ".".join((*at, key.value))
            raise ConfigError(
                f"{name}:{line}: duplicate key {path} (first on line {first[key.value]})"
            )
        first[str(key.value)] = line
