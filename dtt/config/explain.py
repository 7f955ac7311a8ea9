"""Validation errors as lines for people: where (file:line or flag), what, how to mend it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from reprlib import Repr
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dtt.config.fields import leaves, list_item, lists, sections, subsection, union_members
from dtt.config.schema import Config
from dtt.config.section import Section
from dtt.config.yaml_text import Key

MESSAGES = {
    "model_type": "should be a section (keys and values)",
    "model_attributes_type": "should be a section (keys and values)",
    "tuple_type": "should be a list",
    "too_long": "has too many values",
    "finite_number": "should be a finite number",
}

PATTERNS = {
    r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$": "should be module:function",
    r"^[1-9]\d*(-[1-9]\d*)?$": "should be a step or two, as in 6-8",
    r"^[\w.-]+$": "should be letters, digits, '.', '_' and '-'",
    r"^[\w.-]+(/[\w.-]+)?$": "should be a data set's name on the Hub, as in owner/name",
    r"^[^/\\\s.][^/\\\n\t]*$": "should be a folder's name: no slashes, no dot or space first",
}
"""What the patterns of the schema ask for."""

_brief = Repr()
_brief.maxstring = _brief.maxother = 100


def error_lines(error: ValidationError, origins: Mapping[Key, str]) -> Iterator[str]:
    """One line for each thing that is wrong; `origins` says which line or flag set a key."""
    for detail in error.errors(include_url=False):
        key, union, names = _locate(detail)
        message = _message(detail, key, union, names)
        yield _where(key, message, origins) + message


def did_you_mean(word: str, known: list[str]) -> str:
    """ ", did you mean X?" for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, known, 1, 0.7)
    return f", did you mean {near[0]}?" if near else ""


def _locate(detail: ErrorDetails) -> tuple[Key, str, list[str]]:
    """The dotted key of an error without the union tags that pydantic puts into it.

    Also the innermost union on the way, as "optimizer adamw" (empty when there is none), and the
    names of the members of the last one.
    """
    parts, key, union = list(detail["loc"]), [], ""
    members: dict[str, type[Section]] = {}
    section: type[Section] | None = Config
    while parts:
        name = str(parts.pop(0))
        key.append(name)
        field = section.model_fields.get(name) if section else None
        item = list_item(field) if field else None
        if item is not None and parts:
            field = item
            key.append(str(parts.pop(0)))
        members = union_members(field) if field else {}
        section = subsection(field) if field else None
        if members and parts:
            tag = str(parts.pop(0))
            section, union = members[tag], f"{'.'.join(key)} {tag}"
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        key.append("name")
    return tuple(key), union, list(members)


def _where(key: Key, message: str, origins: Mapping[Key, str]) -> str:
    """The place that set `key`, and its name unless the place is the flag of that name."""
    path = ".".join(key)
    if not key:  # a rule over several sections: its message names the settings
        named = [tuple(name.split(".")) for name in re.findall(r"[a-z_]+(?:\.[a-z_]+)+", message)]
        return next((f"{origins[name]}: " for name in named if name in origins), "")
    known = next((key[:n] for n in range(len(key), 0, -1) if key[:n] in origins), None)
    if known is None:
        return f"{path}: "
    place = origins[known]
    return f"{place}: " if place.startswith("-") and known == key else f"{place}: {path}: "


def _message(detail: ErrorDetails, key: Key, union: str, names: list[str]) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return _unknown(key, union)
    if kind == "union_tag_invalid":
        context = detail["ctx"]
        tags = context["expected_tags"].replace("'", "")
        return f"should be one of {tags}, got {context['tag']!r}"
    if kind == "union_tag_not_found":
        return f"is required: one of {', '.join(names)}"
    text = re.sub(r"^(Value error, |Input )|, (unable to|got) .*", "", detail["msg"])
    text = MESSAGES.get(kind, text)
    if kind == "string_pattern_mismatch":
        text = PATTERNS.get(detail["ctx"]["pattern"], text)
    if kind == "too_short":
        least = detail["ctx"]["min_length"]
        return f"needs at least {'one value' if least == 1 else f'{least} values'}"
    if kind == "missing":
        if key[-1].isdigit():
            return "one value is missing"
        return "is required" + (f" by {union}" if union else "")
    if kind == "value_error":
        return text
    if kind == "string_type" and isinstance(value, int | float):
        return f"{text}, got {_plain(value)} (quotes make it text)"
    return f"{text[0].lower()}{text[1:]}, got {_plain(value)}"


def _plain(value: Any) -> str:
    """A value as YAML has it, cut to a readable length."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _brief.repr(value)


def _unknown(key: Key, union: str) -> str:
    path, known = ".".join(key), [*leaves(), *sections()]
    listed = next((name for name in lists() if path.startswith(f"{name}.")), None)
    if listed is not None:
        kinds = lists()[listed]
        kind = kinds.get(union.rpartition(" ")[2]) or next(iter(kinds.values()))
        inside = [leaf.path for leaf in kind.leaves]
        hint = did_you_mean(".".join(key[listed.count(".") + 2 :]), inside)
        return f"unknown key{hint}" if hint else f"unknown key in {union or listed}"
    leaf = leaves().get(path)
    if leaf and leaf.members and union:
        return f"{union} has no {key[-1]} ({', '.join(leaf.members)} {_has(leaf.members)})"
    section = ".".join(key[:-1])
    siblings = {name.split(".")[-1]: name for name in known if name.rpartition(".")[0] == section}
    same_name = [name for name in known if name.split(".")[-1] == key[-1]]
    near = difflib.get_close_matches(key[-1], siblings, 1, 0.7)
    hints = [*same_name, *(siblings[name] for name in near)]
    if hints:
        return f"unknown key, did you mean {hints[0]}?"
    return f"unknown key in {section}" if section else "unknown key"


def _has(members: tuple[str, ...]) -> str:
    return "has it" if len(members) == 1 else "have it"
