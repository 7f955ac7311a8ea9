"""The configuration's command line, generated from the schema: a flag per setting, and aliases."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtt.config.fields import Leaf, leaves
from dtt.config.help import config_help, configuration_page, section_help
from dtt.config.layers import exists
from dtt.config.load import load_config
from dtt.config.parser import CommandParser, ShowHelp
from dtt.config.schema import Config
from dtt.errors import ConfigError

# Familiar names for a setting. A setting of two words reads the same with - and with _.
ALIASES: dict[str, tuple[str, ...]] = {
    "name": ("-n",),
    "dir": ("--checkpoint-dir",),
    "seed": ("-s",),
    "model.preset": ("--model",),
    "model.context": ("--block-size", "--n-ctx"),
    "model.dropout": ("--dropout",),
    "tokenizer.vocab_size": ("-v", "--vocab-size"),
    "training.max_steps": ("--max-steps",),
    "training.epochs": ("-e", "--epochs"),
    "training.batch_size": ("-b", "--batch-size"),
    "training.micro_batch_size": ("--micro-batch-size",),
    "training.accumulation": ("--grad-acc-steps",),
    "training.precision": ("--precision",),
    "training.compile": ("--compile",),
    "training.device": ("--device",),
    "optimizer.name": ("--optimizer",),
    "optimizer.lr": ("--lr", "--learning-rate"),
    "optimizer.weight_decay": ("--weight-decay",),
    "schedule.name": ("--schedule",),
    "schedule.warmup_steps": ("--warmup-steps",),
    "parallel.world_size": ("--world-size",),
    "logging.level": ("--log-level",),
    "logging.tensorboard": ("--tensorboard",),
    "logging.wandb": ("--wandb",),
    "logging.profile": ("--profile",),
}


@dataclass
class Given:
    """What the command line says about the configuration: load_config's arguments."""

    overrides: dict[str, tuple[str, str]] = field(default_factory=dict)
    implied: dict[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    corpus_flag: str = ""

    def set(self, path: str, flag: str, text: str) -> None:
        self.overrides[path] = (flag, text)

    def set_corpus(self, flag: str) -> None:
        """-d and --data-path name the same thing: with both, the order would decide."""
        if self.corpus_flag not in ("", flag):
            raise ConfigError(f"{self.corpus_flag} and {flag} both name the corpus; give one")
        self.corpus_flag = flag


def _data_path(given: Given, flag: str, text: str) -> None:
    given.set_corpus(flag)
    given.set("data.source.name", flag, "text")
    # The name of an existing file may have commas in it.
    is_one = not text.startswith("[") and exists(Path(text))
    given.set("data.source.path", flag, json.dumps([text]) if is_one else text)
    given.implied["tokenizer"] = {"name": "char"}


def _dataset(given: Given, flag: str, text: str) -> None:
    if text in ("tales", "stdlib"):
        given.set_corpus(flag)
        given.set("data.source.name", flag, text)
    elif text.endswith((".yaml", ".yml")):
        given.set_corpus(flag)
        given.dataset = text
    else:
        _data_path(given, flag, text)
        if not all(name.strip(" []\"'").endswith(".txt") for name in text.split(",")):
            given.implied.clear()


def _tokenizer(given: Given, flag: str, text: str) -> None:
    is_file = text.endswith(".json") or exists(Path(text))
    known = leaves()["tokenizer.name"].type.split("|")
    if is_file and text not in known:
        given.set("tokenizer.name", flag, "file")
        given.set("tokenizer.path", flag, text)
    else:
        given.set("tokenizer.name", flag, text)


Composite = Callable[[Given, str, str], None]

# Aliases that say more than one setting: (names, value, what they mean, how).
COMPOSITES: tuple[tuple[tuple[str, ...], str, str, Composite], ...] = (
    (("--data-path",), "PATH ...", "text files as the corpus; characters, unless told", _data_path),
    (
        ("-d", "--dataset"),
        "CORPUS ...",
        "tales, stdlib, text files, or a .yaml with the keys of `data`",
        _dataset,
    ),
    (("--tokenizer",), "NAME|FILE", "char, byte, bpe or a tokenizer.json", _tokenizer),
)


class ConfigParser(CommandParser):
    """The parser of a command that takes a configuration."""

    def __init__(self, prog: str, description: str, examples: Sequence[str]) -> None:
        super().__init__(
            prog, f"{prog} [-c FILE ...] [--section.field VALUE ...]", description, examples
        )
        self.add_argument(
            "-c",
            "--config",
            action="append",
            default=[],
            metavar="FILE",
            help="YAML file or preset; several are layered, the later ones win",
        )
        self.add_argument(
            "--print-config", action="store_true", help="print what would run, as YAML, and stop"
        )
        self.set_defaults(given=None)
        for leaf in leaves().values():
            self._add_leaf(leaf)
        for names, value, _, apply in COMPOSITES:
            nargs = "+" if value.endswith("...") else None
            self.add_argument(*names, action=_Setting, nargs=nargs, apply=apply)

    def _add_leaf(self, leaf: Leaf) -> None:
        names = [leaf.flag, *ALIASES.get(leaf.path, ())]
        self.shown += names
        names = [name.replace("_", "-") for name in names]

        def apply(given: Given, flag: str, text: str) -> None:
            given.set(leaf.path, flag, text)

        def negate(given: Given, flag: str, text: str) -> None:
            given.set(leaf.path, flag, "false")

        nargs = "?" if leaf.is_bool else "+" if leaf.is_list else None
        self.add_argument(*names, action=_Setting, nargs=nargs, const="true", apply=apply)
        if leaf.is_bool:
            negated = [name.replace("--", "--no-", 1) for name in names]
            self.add_argument(*negated, action=_Setting, nargs=0, apply=negate)

    def _add_help(self) -> None:
        text = "show this help, or that of a section"
        self.add_argument("-h", "--help", action=ShowHelp, nargs="?", metavar="SECTION", help=text)

    def config(self, options: argparse.Namespace) -> Config:
        """The configuration that the files and flags of a parsed command line give."""
        given = options.given or Given()
        if options.debug:
            given.overrides.setdefault("logging.level", ("--debug", "debug"))
        return load_config(options.config, given.overrides, given.implied, given.dataset)

    def help_text(self, section: str | None) -> str:
        if section is not None:
            return section_help(self.prog, section, ALIASES)
        settings = config_help(self.prog, *_tables())
        return f"{self.format_help()}\n{settings}\n{self.examples_text()}"


def docs_page() -> str:
    """The text of docs/configuration.md."""
    return configuration_page(*_tables())


def _tables() -> tuple[dict[str, tuple[str, ...]], list[tuple[str, str]]]:
    composites = [
        (f"{', '.join(names)} {value}", meaning) for names, value, meaning, _ in COMPOSITES
    ]
    return ALIASES, composites


class _Setting(argparse.Action):
    """Hands what was typed to `apply(given, flag as typed, text)`."""

    def __init__(self, *args: Any, apply: Composite, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "dest": "given", "help": argparse.SUPPRESS})
        self.apply = apply

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, ConfigParser) and option_string is not None
        namespace.given = namespace.given or Given()
        if isinstance(values, list):
            values = values[0] if len(values) == 1 else json.dumps(values)
        self.apply(namespace.given, parser.typed.get(option_string, option_string), values)
