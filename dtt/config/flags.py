"""The configuration's command line, generated from the schema: a flag per setting, and aliases."""

from __future__ import annotations

import argparse
import json
import re
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
from dtt.config.sources import DATA_SET_FILES, record_format
from dtt.errors import ConfigError

# Familiar names for a setting. A setting of two words reads the same with - and with _.
ALIASES: dict[str, tuple[str, ...]] = {
    "name": ("-n",),
    "dir": ("--checkpoint-dir",),
    "seed": ("-s",),
    "data.source.max_documents": ("--max-documents",),
    "data.source.max_bytes": ("--max-bytes",),
    "model.preset": ("--model",),
    "model.context": ("--block-size", "--n-ctx"),
    "model.dropout": ("--dropout",),
    "tokenizer.vocab_size": ("-v", "--vocab-size"),
    "training.engine": ("--engine",),
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


PROJECT_DATASETS = Path("configs/project_datasets")
"""Where the project that is worked in keeps its dataset files: -d finds them by their names."""
FILE_ENDING = re.compile(r"\.(txt|md|text|json\w*|ndjson|parquet|arrow|csv|py|gz|zst|bz2|xz)$")


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
    # The name of an existing file may have commas in it.
    is_one = not text.startswith("[") and exists(Path(text))
    names = [text] if is_one else [name.strip(" \"'") for name in text.strip("[]").split(",")]
    rows = [_has_rows(name) for name in names if name]
    if any(rows) and not all(rows):
        raise ConfigError(
            f"{flag}: {names[rows.index(True)]} has rows, {names[rows.index(False)]} is text",
            "give files of one kind",
        )
    given.set("data.source.name", flag, "records" if any(rows) else "text")
    given.set("data.source.path", flag, json.dumps([text]) if is_one else text)
    if not any(rows):
        given.implied["tokenizer"] = {"name": "char"}


def _has_rows(name: str) -> bool:
    """Whether a path is of JSON lines, Parquet or Arrow: by its ending, or as a folder of these."""
    path = Path(name)
    if record_format(name) or any(exists(path / file) for file in DATA_SET_FILES):
        return True
    try:
        inside = [file.name for file in path.iterdir() if file.name[0] != "." and file.is_file()]
    except (OSError, ValueError):  # a file, a glob, or nothing
        return False
    return bool(inside) and all(record_format(file) for file in inside)


def _dataset(given: Given, flag: str, text: str) -> None:
    if text in ("tales", "stdlib"):
        given.set_corpus(flag)
        given.set("data.source.name", flag, text)
    elif text.endswith((".yaml", ".yml")):
        given.set_corpus(flag)
        given.dataset = text
    elif exists(PROJECT_DATASETS / f"{text}.yaml"):
        given.set_corpus(flag)
        given.dataset = str(PROJECT_DATASETS / f"{text}.yaml")
    elif text.strip('["').startswith(("http://", "https://")):
        given.set_corpus(flag)
        given.set("data.source.name", flag, "url")
        given.set("data.source.urls", flag, text if text[0] == "[" else json.dumps([text]))
    elif is_hub_name(text):
        given.set_corpus(flag)
        given.set("data.source.name", flag, "hub")
        given.set("data.source.dataset", flag, text)
    else:
        _data_path(given, flag, text)
        if not all(name.strip(" []\"'").endswith(".txt") for name in text.split(",")):
            given.implied.clear()


def is_hub_name(text: str) -> bool:
    """Whether it reads as ORG/NAME on the Hub: no file of that name is here, nor would be."""
    plain = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text)
    return plain is not None and not exists(Path(text)) and not FILE_ENDING.search(text)


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
    (
        ("--data-path",),
        "PATH ...",
        "text files (characters, unless told), JSON lines, Parquet or Arrow",
        _data_path,
    ),
    (
        ("-d", "--dataset"),
        "CORPUS ...",
        "tales, stdlib, files, ORG/NAME on the Hub, URLs, or a .yaml with the keys of `data`",
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
