"""argparse as every command of dtt uses it: errors are ConfigErrors, help ends with examples."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from dtt.config.explain import did_you_mean
from dtt.errors import ConfigError

HEADING, NAME, OFF = "\033[1m", "\033[36m", "\033[0m"


class CommandParser(argparse.ArgumentParser):
    """A command's parser; abbreviations are refused: a new flag must not change an old line."""

    def __init__(self, prog: str, usage: str, description: str, examples: Sequence[str]) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            allow_abbrev=False,
            add_help=False,
            formatter_class=_Formatter,
        )
        self.color = False  # Python 3.14 would colour what `coloured` colours
        self.examples = examples
        self.shown: list[str] = []
        self.typed: dict[str, str] = {}
        """Options on the command line as they were typed, by their name with hyphens."""
        self._add_help()
        self.add_argument("--debug", action="store_true", help="show tracebacks and debug messages")

    def _add_help(self) -> None:
        self.add_argument("-h", "--help", action=ShowHelp, nargs=0, help="show this help")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of `argv`; ConfigError names an option that is unknown or lacks its value.

        Every option may be written with - or _ between its words.
        """
        self.typed = {_name(word): word.split("=")[0] for word in argv if word.startswith("-")}
        options, rest = self.parse_known_args([_plain(word) for word in argv])
        if rest:
            if not rest[0].startswith("-"):
                raise ConfigError(f"unexpected argument {rest[0]!r}")
            word = self.typed[_name(rest[0])]
            raise ConfigError(f"unknown option {word}{self._hint(word)}")
        return options

    def error(self, message: str) -> NoReturn:
        match = re.match(r"argument ([^:]+): (.*)", message)
        if match is None:
            raise ConfigError(message)
        names, problem = match[1].split("/"), match[2]
        flag = next((self.typed[name] for name in names if name in self.typed), match[1])
        raise ConfigError(f"{flag}: {re.sub(r'^expected .*argument.*', 'needs a value', problem)}")

    def help_text(self, section: str | None) -> str:
        """The whole help; only some commands have sections."""
        return f"{self.format_help()}\n{self.examples_text()}"

    def examples_text(self) -> str:
        return "examples:\n" + "\n".join(f"  {example}" for example in self.examples)

    def _hint(self, word: str) -> str:
        plain = word.replace("_", "-")
        options = self._option_string_actions
        shown = {name.replace("_", "-"): name for name in (*options, *self.shown)}
        same_field = [name for name in self.shown if name.endswith(f".{word.lstrip('-')}")]
        if same_field:
            return f", did you mean {same_field[0]}?"
        hint = did_you_mean(plain, list(shown)) or f"; `{self.prog} --help` lists them"
        return re.sub(r"--?[\w.-]+", lambda name: shown[name[0]], hint)


def _plain(word: str) -> str:
    """An option with hyphens between its words, as argparse knows it; other words as they are."""
    return re.sub(r"^--[\w.-]+", lambda name: name[0].replace("_", "-"), word)


def _name(word: str) -> str:
    return _plain(word).split("=")[0]


def coloured(text: str) -> str:
    """Help text with headings and option names coloured, on a terminal without NO_COLOR."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    text = re.sub(r"(?m)^(\w[\w .]*:)", rf"{HEADING}\1{OFF}", text)
    return re.sub(r"(?<![\w/-])(--?[a-zA-Z][\w.-]*)", rf"{NAME}\1{OFF}", text)


def at_least(
    minimum: float, kind: type[int] | type[float] = int, maximum: float = float("inf")
) -> Callable[[str], int | float]:
    """An argparse type: a finite number of this kind from `minimum` to `maximum`."""
    name = "an integer" if kind is int else "a number"
    limits = f"from {minimum} to {maximum}" if maximum < float("inf") else f"of at least {minimum}"

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (minimum <= value <= maximum and value < float("inf")):
            raise argparse.ArgumentTypeError(f"should be {name} {limits}, got {text!r}")
        return value

    return read


class ShowHelp(argparse.Action):
    """Prints the help, or that of the section named, and ends."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, CommandParser)
        print(coloured(parser.help_text(values or None)))
        raise SystemExit(0)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **others: Any) -> None:
        super().__init__(prog, max_help_position=34, width=100)
