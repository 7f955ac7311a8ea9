"""Help texts and docs/configuration.md, generated from the schema."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dtt.config.explain import did_you_mean
from dtt.config.fields import Item, Leaf, leaves, lists, sections
from dtt.errors import ConfigError

Aliases = Mapping[str, Sequence[str]]
Composites = Sequence[tuple[str, str]]


def config_help(prog: str, aliases: Aliases, composites: Composites) -> str:
    """The part of a command's help on the configuration: aliases, then one line per section."""
    names = {
        leaf.path: (leaf.flag.replace("_", "-"),)
        for leaf in leaves().values()
        if "." not in leaf.path
    }
    rows = [
        (", ".join(flags), f"{_brief(leaves()[path])} [{path}]")
        for path, flags in (names | dict(aliases)).items()
    ]
    text = "familiar names:\n" + _table([*composites, *rows])
    inner = [(path, doc) for path, doc in sections().items() if "." not in path]
    title = f"sections (`{prog} --help model` shows the settings of one):\n"
    return f"{text}\n{title}{_table(inner)}"


def section_help(prog: str, section: str, aliases: Aliases) -> str:
    """Every setting of a section, nested ones included, with type, default and documentation."""
    path = _find(section)
    prefix = "" if path == "run" else f"{path}."
    inside = [leaf for leaf in leaves().values() if _is_inside(leaf, path)]
    doc = " ".join(sections()[path].split())
    text = f"usage: {prog} [--{prefix}FIELD VALUE ...]\n\n{path}: {doc}\n\n"
    for leaf in inside:
        text += _entry(", ".join([leaf.flag, *aliases.get(leaf.path, ())]), leaf)
    for name, item in lists().get(path, {}).items():
        text += f"\n{name or 'each'}: {' '.join(item.doc.split())}\n"
        text += "".join(_entry(leaf.path, leaf) for leaf in _settings(name, item))
    return text


def _settings(name: str, item: Item) -> list[Leaf]:
    """What can be set in an item of a list; the name of its kind is its heading."""
    return [leaf for leaf in item.leaves if not (name and leaf.path == "name")]


def _entry(names: str, leaf: Leaf) -> str:
    note = f"{leaf.doc} (default: {leaf.default})"
    wrapped = textwrap.fill(note, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"  {names}  {leaf.type}\n{wrapped}\n"


def configuration_page(aliases: Aliases, composites: Composites) -> str:
    """docs/configuration.md: every section, setting, type, default, documentation and alias."""
    page = [
        "# Configuration",
        "<!-- Written by `dtt config docs`; change the schema, not this file. -->",
        "Settings come from the defaults below, then YAML files (`-c`, several are layered), then "
        "the command line, where every setting is `--section.field VALUE`. A YAML file may name "
        "files or presets that it builds on: `extends: gpt2`. `dtt train --print-config` shows "
        "what would run.",
    ]
    for section, doc in sections().items():
        own = [leaf for leaf in leaves().values() if leaf.section == section]
        title = f"## {section}" if "." not in section else f"### {section}"
        rows = "\n".join(_row(leaf, aliases) for leaf in own)
        head = "| setting | type | default | meaning |\n|---|---|---|---|\n"
        page += [f"{title}\n\n{doc}", head + rows] if own else [f"{title}\n\n{doc}"]
        for name, item in lists().get(section, {}).items():
            rows = "\n".join(
                _row(replace(leaf, path=f"{section}[].{leaf.path}"), {})
                for leaf in _settings(name, item)
            )
            page += [f"**{name}**: {item.doc}"] if name else []
            page += [head + rows] if rows else []
    rows = "\n".join(f"| `{_cell(names)}` | {_cell(meaning)} |" for names, meaning in composites)
    page.append("## Shorthands\n\nFlags that say more than one setting.")
    page.append(f"| flag | meaning |\n|---|---|\n{rows}")
    return "\n\n".join(page) + "\n"


def _row(leaf: Leaf, aliases: Aliases) -> str:
    names = ", ".join(f"`{name}`" for name in aliases.get(leaf.path, ()))
    meaning = leaf.doc + (f" Also {names}." if names else "")
    return f"| `{leaf.path}` | {_cell(leaf.type)} | {_cell(leaf.default)} | {_cell(meaning)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "".join(f"  {name:<26} {meaning}\n" for name, meaning in rows)


def _brief(leaf: Leaf) -> str:
    """The first clause of a setting's documentation, or the names it can have."""
    return leaf.type if leaf.path.endswith(".name") else re.split(r"[.;:]( |$)| \(", leaf.doc)[0]


def _is_inside(leaf: Leaf, section: str) -> bool:
    return leaf.section == section or leaf.section.startswith(f"{section}.")


def _find(section: str) -> str:
    known = list(sections())
    for path in known:
        if section in (path, path.split(".")[-1]):
            return path
    hint = did_you_mean(section, known) or f" (known: {', '.join(known)})"
    raise ConfigError(f"--help: no section {section!r}{hint}")
