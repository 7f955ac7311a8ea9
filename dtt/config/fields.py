"""What the schema says about itself: every leaf with its type, default and documentation.

Flags, help, docs/configuration.md and the did-you-mean lines are all generated from here, so that
a field added to the schema appears in each of them without another line of code.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from dtt.config.schema import Config
from dtt.config.section import Section

NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}
BOUNDS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}"}


@dataclass(frozen=True)
class Leaf:
    """One setting: `path` is dotted, `type` and `default` are text for people."""

    path: str
    annotation: Any
    doc: str
    type: str
    default: str
    members: tuple[str, ...] = ()
    """Union members that have this field; empty when it does not depend on a union."""

    @property
    def flag(self) -> str:
        return f"--{self.path}"

    @property
    def section(self) -> str:
        """Dotted path of the section; the top level is called `run`."""
        return self.path.rpartition(".")[0] or "run"

    @property
    def is_bool(self) -> bool:
        return self.annotation is bool

    @property
    def is_mapping(self) -> bool:
        return get_origin(self.annotation) is dict

    @property
    def is_list(self) -> bool:
        return get_origin(self.annotation) is tuple


class Item(NamedTuple):
    """One kind of item of a list of sections: what it is, and its settings, without the list's path
    and the item's number."""

    doc: str
    leaves: tuple[Leaf, ...]


def union_members(field: FieldInfo) -> dict[str, type[Section]]:
    """The members of a union of sections by their name; empty for any other field."""
    if field.discriminator is None:
        return {}
    return {
        get_args(member.model_fields["name"].annotation)[0]: member
        for member in get_args(field.annotation)
    }


def subsection(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, when it holds just one kind, or that or null."""
    kind = field.annotation
    if is_optional(field) and len(arguments := get_args(kind)) == 2:
        kind = next(argument for argument in arguments if argument is not type(None))
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def is_optional(field: FieldInfo) -> bool:
    """Whether a field may be null."""
    return type(None) in get_args(field.annotation)


def list_item(field: FieldInfo) -> FieldInfo | None:
    """What a list of sections holds, as if it were a field; None for any other field."""
    arguments = get_args(field.annotation)
    if get_origin(field.annotation) is not tuple or arguments[-1] is not ...:
        return None
    item = FieldInfo.from_annotation(arguments[0])
    return item if subsection(item) or union_members(item) else None


@cache
def leaves() -> dict[str, Leaf]:
    """Every setting of the schema by its dotted path, in the schema's order."""
    found: dict[str, Leaf] = {}
    for leaf in _walk(Config, ""):
        same = found.get(leaf.path)
        if same is None:
            found[leaf.path] = leaf
        elif leaf.members and leaf.members[0] not in same.members:
            found[leaf.path] = replace(
                same,
                doc=same.doc
                if same.doc == leaf.doc
                else f"{same.doc} {leaf.members[0]}: {leaf.doc}",
                default=f"{same.default}, {leaf.default}",
                members=same.members + leaf.members,
            )
    return found


@cache
def sections() -> dict[str, str]:
    """Documentation of every section, nested ones included, by its dotted path."""
    return {"run": "The run as a whole.", **dict(_sections(Config, ""))}


@cache
def lists() -> dict[str, dict[str, Item]]:
    """The items of every list of sections by its dotted path, then by their name (or "")."""
    return dict(_lists(Config, ""))


def _lists(section: type[Section], prefix: str) -> Iterator[tuple[str, dict[str, Item]]]:
    for name, field in section.model_fields.items():
        inner, item = subsection(field), list_item(field)
        if item is not None:
            only = subsection(item)
            kinds = {"": only} if only else union_members(item)
            yield (
                f"{prefix}{name}",
                {
                    tag: Item((kind.__doc__ or "").strip(), tuple(_walk(kind, "")))
                    for tag, kind in kinds.items()
                },
            )
        for kind in [inner] if inner else list(union_members(field).values()):
            yield from _lists(kind, f"{prefix}{name}.")


def _sections(section: type[Section], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        inner = subsection(field)
        kinds = [inner] if inner else list(union_members(field).values())
        if kinds or list_item(field):
            yield f"{prefix}{name}", field.description or ""
        for kind in kinds:
            yield from _sections(kind, f"{prefix}{name}.")


def _walk(section: type[Section], prefix: str) -> Iterator[Leaf]:
    for name, field in section.model_fields.items():
        path, members, inner = f"{prefix}{name}", union_members(field), subsection(field)
        if members:
            chosen = "required" if field.is_required() else field.get_default().name
            doc = "; ".join(f"{tag}: {_first_line(kind)}" for tag, kind in members.items())
            names = Literal[tuple(members)]  # type: ignore[valid-type]
            yield Leaf(f"{path}.name", names, doc, "|".join(members), chosen)
            for tag, kind in members.items():
                for leaf in _walk(kind, f"{path}."):
                    if leaf.members:  # of a union within this one
                        yield leaf
                    elif leaf.path != f"{path}.name":
                        yield replace(leaf, default=f"{tag} {leaf.default}", members=(tag,))
        elif inner is not None:
            yield from _walk(inner, f"{path}.")
        else:
            value = field.get_default(call_default_factory=True)
            default = "required" if field.is_required() else show(value)
            kind_text = " ".join([type_text(field.annotation), *_bounds(field.metadata)])
            yield Leaf(path, field.annotation, field.description or "", kind_text, default)


def _first_line(section: type[Section]) -> str:
    return (section.__doc__ or "").splitlines()[0].rstrip(".")


def _bounds(metadata: list[Any]) -> list[str]:
    """The limits of a number as text, such as "> 0"; limits of a text's form are left out."""
    limits = [
        text.format(getattr(mark, name))
        for mark in metadata
        for name, text in BOUNDS.items()
        if hasattr(mark, name)
    ]
    return [", ".join(limits)] if limits else []


def type_text(annotation: Any) -> str:
    """A type in a user's words: "integer or null", "adam|sgd", "list of text"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(str(value) for value in arguments)
    if origin is Annotated:
        return type_text(arguments[0])
    if origin in (Union, types.UnionType):
        kinds = [type_text(kind) for kind in arguments if kind is not type(None)]
        return " or ".join([*kinds, "null"] if type(None) in arguments else kinds)
    if origin is dict:
        return "keys and values"
    if origin is tuple:
        if list_item(FieldInfo.from_annotation(annotation)):
            return "list of sections"
        inner = type_text(arguments[0])
        return f"list of {inner}" if arguments[-1] is ... else f"{len(arguments)} {inner}s"
    return NAMES.get(annotation, str(annotation))


def show(value: Any) -> str:
    """A default as it would be typed in YAML: null, true, [0.9, 0.95]."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(show(item) for item in value) + "]"
    return str(value)
