"""Runs that start from a folder of transformers: the folder, the flags, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from stock_models import LLAMA, make_run

from dtt.config.load import load_config
from dtt.config.schema import Config
from dtt.huggingface.export import open_export, write_export
from dtt.huggingface.origin import with_origin
from dtt.metrics.loggers import read_metrics
from dtt.model.decoder import Decoder

Command = Callable[..., tuple[int, str, str]]
TRAINING = {
    "data.source.name": "text",
    "data.source.path": "text.txt",
    "data.workers": "1",
    "training.batch_size": "4",
    "training.precision": "fp32",
    "training.device": "cpu",
    "training.threads": "1",
    "evaluation.max_tokens": "256",
    "sample.prompts": "[]",
    "optimizer.name": "adamw",
    "schedule.name": "constant",
}


def folder_of(settings: dict[str, Any] = LLAMA, name: str = "start") -> tuple[Path, Decoder]:
    """Export a random model without proof; return the folder and the model."""
    run, ours = make_run(Path("made") / name, settings)
    folder = Path(name)
    write_export(open_export(run, "last", "hf", "fp32"), folder, verify=False)
    return folder, ours


def flags(**changes: str) -> list[str]:
    merged = TRAINING | {key.replace("__", "."): value for key, value in changes.items()}
    return [word for key, value in merged.items() for word in (f"--{key}", value)]


def config_of(folder: Path, **changes: str) -> Config:
    given = TRAINING | {"init_from": str(folder)}
    given |= {key.replace("__", "."): value for key, value in changes.items()}
    return with_origin(load_config((), {k: (f"--{k}", v) for k, v in given.items()}))


def losses_of(run: str) -> list[float]:
    rows = read_metrics(Path("runs") / run / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value != "gone"}))


def weights_changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
