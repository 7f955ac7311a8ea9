"""The run folder: its name, what dtt writes into it, and what it must not touch."""

from __future__ import annotations

import json
from pathlib import Path

from dtt import storage
from dtt.config.load import json_schema, to_yaml
from dtt.config.schema import Config
from dtt.errors import ConfigError
from dtt.tokenizer import Tokenizer

OPEN = {"lock", "logs"}
"""What a run has open from its start on."""
OWN = OPEN | {
    "config.yaml",
    "config.schema.json",
    "tokenizer.json",
    "metrics.jsonl",
    "progress.json",
    "samples.jsonl",
    "loss.png",
    "checkpoints",
    "profile",
    "tensorboard",
    "wandb",
    "mlflow",
    "mlflow.json",
}


def run_folder(config: Config) -> Path:
    """Return the folder of the run that this configuration names."""
    assert config.name is not None, "the name is resolved when a configuration is loaded"
    return config.dir / config.name


def refuse_foreign_folder(folder: Path) -> None:
    """Raise ConfigError if `folder` is there and holds something else than a run."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names - OPEN and not names & {"config.yaml", "checkpoints"}:
        raise ConfigError(
            f"{folder} is not a run: it holds {', '.join(sorted(names - OPEN)[:3])}",
            "give the run another --name or --checkpoint-dir",
        )


def remove_old_run(folder: Path) -> None:
    """Remove what runs write, but for the lock and the log, which this process has open."""
    for old in folder.iterdir():
        if old.name in OWN - OPEN:
            storage.remove(old)


def write_run_files(config: Config, tokenizer: Tokenizer, folder: Path) -> None:
    """Write what makes the folder usable by itself: configuration, its schema, tokenizer."""
    files = {
        "config.yaml": to_yaml(config),
        "config.schema.json": json.dumps(json_schema(), indent=2),
        "tokenizer.json": tokenizer.to_json(),
    }
    for name, text in files.items():
        storage.write_atomic(folder / name, text)
