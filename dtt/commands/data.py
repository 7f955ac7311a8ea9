"""`dtt data`: a command of commands, each in its own module."""

from __future__ import annotations

import difflib
from importlib import import_module

from dtt.config.parser import coloured
from dtt.errors import ConfigError

# name: (summary, module:function with argv -> exit code)
SUBCOMMANDS = {
    "inspect": ("Try the cleaning steps on a sample.", "dtt.commands.inspect:run"),
    "show": ("Show documents, windows, or where a text occurs.", "dtt.commands.look:show"),
    "stats": ("Measure lengths, duplicates, use of the vocabulary.", "dtt.commands.look:stats"),
    "audit": ("Prove which samples each step of a run saw.", "dtt.commands.look:audit"),
}
EXAMPLES = (
    "dtt data inspect -c run.yaml",
    "dtt data show book-char --search castle",
    "dtt data stats book-char -o lengths.png",
    "dtt data audit runs/book",
)


def run(argv: list[str]) -> int:
    """Find the subcommand and run it."""
    debug = [word for word in argv if word == "--debug"]
    words = [word for word in argv if word != "--debug"]
    if words and words[0] in SUBCOMMANDS:
        module, _, function = SUBCOMMANDS[words[0]][1].partition(":")
        return int(getattr(import_module(module), function)([*debug, *words[1:]]))
    if words and words[0] not in ("-h", "--help"):
        near = difflib.get_close_matches(words[0], SUBCOMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(SUBCOMMANDS)}"
        raise ConfigError(f"dtt data has no {words[0]!r}", hint)
    print(coloured(_help()))
    return 0


def _help() -> str:
    commands = "\n".join(f"  {name:<10} {summary}" for name, (summary, _) in SUBCOMMANDS.items())
    examples = "\n".join(f"  {example}" for example in EXAMPLES)
    return (
        "usage: dtt data SUBCOMMAND [options]\n\n"
        "Look at data, before and after it is prepared.\n\n"
        f"subcommands:\n{commands}\n\n"
        "`dtt data SUBCOMMAND --help` shows its options.\n\n"
        f"examples:\n{examples}"
    )
