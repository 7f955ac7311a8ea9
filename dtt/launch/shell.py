"""Commands as text for bash: quoted, and folded so that people can read them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

WIDTH = 96


def command(*parts: Sequence[str], indent: str = "", end: str = "") -> str:
    """Return the words of all parts as one command of bash, with `end` after it.

    Bash reads back exactly these words, whatever blanks, quotes, `$` or newlines they have. A long
    command has a line for each part and for each option.
    """
    return folded(*([shlex.quote(word) for word in part] for part in parts), indent=indent, end=end)


def folded(*parts: Sequence[str], indent: str = "", end: str = "") -> str:
    """As `command`, of words that are quoted already."""
    lines: list[list[str]] = []
    for part in parts:
        for place, word in enumerate(part):
            # `python -m dtt train` and `mpirun -n 8` are read as one thing.
            if place == 0 or (place > 1 and word.startswith("-")):
                lines.append([])
            lines[-1].append(word)
    joined = [" ".join(line) for line in lines]
    joined[-1] += end
    whole = indent + " ".join(joined)
    return whole if len(whole) <= WIDTH else indent + f" \\\n{indent}  ".join(joined)


def environment(variables: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Return the parts that come before a command to set variables for it alone."""
    assigned = [f"{name}={value}" for name, value in variables]
    return [["env", *assigned]] if assigned else []


def exports(variables: Iterable[tuple[str, str]]) -> str:
    """Return a line of bash for each variable that the commands after it get."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables)
