"""Slurm's short lists: of nodes, as `node[1-3,7],gpu01`, and of tasks on them, as `2(x3),1`."""

from __future__ import annotations

import re

BRACKETS = re.compile(r"^(.*?)\[([^\[\]]*)\](.*)$")
COUNT = re.compile(r"^(\d+)(?:\(x(\d+)\))?$")
OUTER_COMMA = re.compile(r",(?![^\[]*\])")


def expand_nodes(text: str) -> tuple[str, ...]:
    """Return the nodes of a list in its order, as `scontrol show hostnames` does.

    Numbers keep their leading zeros; several brackets in a name multiply. ValueError if `text` is
    not such a list.
    """
    names = [name for part in OUTER_COMMA.split(text) if part for name in _expand(part)]
    if not names or any(set(name) & set("[] ") for name in names):
        raise ValueError(f"{text!r} is not a list of nodes")
    return tuple(names)


def _expand(part: str) -> list[str]:
    found = BRACKETS.match(part)
    if found is None:
        return [part]
    before, numbers, after = found.groups()
    tails = _expand(after)
    return [f"{before}{number}{tail}" for number in _numbers(numbers) for tail in tails]


def _numbers(text: str) -> list[str]:
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            found.append(str(number).zfill(len(first)))
    return found


def expand_counts(text: str) -> tuple[int, ...]:
    """Return the count of each node, in the order of the nodes; ValueError if `text` has none."""
    found: list[int] = []
    for part in text.split(","):
        group = COUNT.match(part)
        if group is None:
            raise ValueError(f"{text!r} is not a list of counts")
        found += [int(group[1])] * int(group[2] or 1)
    return tuple(found)
