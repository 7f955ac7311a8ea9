"""A trained model from its run folder, ready to evaluate or generate."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from dtt.config.explain import error_lines
from dtt.config.schema import Config
from dtt.config.yaml_text import parse_yaml
from dtt.dist import choose_device
from dtt.errors import CheckpointError, ConfigError
from dtt.metrics.loggers import metrics_table
from dtt.model.kinds import empty_model
from dtt.model.language_model import LanguageModel
from dtt.precision import choose_precision
from dtt.runs import find_run
from dtt.tokenizer import Tokenizer, fingerprint, named_end, parse_tokenizer
from dtt.training.saved import Saved, open_checkpoint


@dataclass(frozen=True)
class LoadedRun:
    """A model with all that it needs to be used."""

    folder: Path
    step: int
    config: Config
    tokenizer: Tokenizer
    corpus: str
    """Name of the prepared data that it was trained on."""
    model: LanguageModel
    """In evaluation mode."""

    @property
    def metrics(self) -> dict[str, list[Any]]:
        """The run's figures so far as columns, one row for each step: step, loss, lr, val_loss, ...

        What was not measured after a step is None there. `pandas.DataFrame(run.metrics)` is a
        table of them. Read anew each time, so that one can look on while it trains.
        """
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing", "its checkpoints work without it")
        return metrics_table(path)


def load_run(
    path: str | Path | None = None,
    *,
    checkpoint: str = "best",
    device: str = "auto",
    precision: str = "auto",
    cast: bool = True,
) -> LoadedRun:
    """Load the model of a run folder; None: the newest run below ./runs.

    `checkpoint` is "best" (lowest validation loss, or the last where none was measured), "last" or
    a step; `path` may also be one checkpoint's folder. Raises CheckpointError if there is no such
    run, or it is damaged. `precision` "auto" is the run's own, as far as the device has it. With
    `cast` parameters are put into the compute type, which is what generation reads fastest;
    without, they stay in fp32, as in training.
    """
    folder = find_run(Path(path) if path is not None else None)
    saved = open_checkpoint(Path(path) if path is not None else folder, checkpoint, ("model",))
    config = saved_config(saved)
    tokenizer = saved_tokenizer(saved)
    chosen = choose_device(device)
    dtype = _precision(precision, config, chosen)
    model = empty_model(config.model)
    weights = saved.tensors("model")
    check_weights(model, saved.shapes("model"), saved.path)
    model.load_state_dict(weights, assign=True)
    if cast:
        model.for_generation(chosen, dtype)
    else:
        model.compute_in(dtype).to(chosen).eval()
    return LoadedRun(folder, saved.step, config, tokenizer, saved.state["corpus"], model)


def _precision(asked: str, config: Config, device: torch.device) -> torch.dtype:
    if asked == "auto":
        with suppress(ConfigError):
            return choose_precision(config.training.precision, device)[0]
    return choose_precision(asked, device)[0]


def saved_config(saved: Saved) -> Config:
    """Return the configuration that a checkpoint was trained with."""
    where = f"{saved.path}/config.yaml"
    text = parse_yaml(saved.files["config.yaml"].decode(), where)
    origins = {key: f"{where}:{line}" for key, line in text.lines.items()}
    try:
        return Config.model_validate(text.tree)
    except ValidationError as error:
        raise CheckpointError(
            "; ".join(error_lines(error, origins)),
            f"the run was made by dtt {saved.manifest['dtt']}; use that version",
        ) from None


def saved_tokenizer(saved: Saved) -> Tokenizer:
    """Return the tokenizer in a checkpoint; CheckpointError if it is not the one trained with."""
    text = saved.files["tokenizer.json"].decode()
    end = named_end(saved_config(saved).tokenizer.model_dump())
    tokenizer = parse_tokenizer(text, f"{saved.path}/tokenizer.json", end)
    if fingerprint(tokenizer) != saved.state["tokenizer"]:
        raise CheckpointError(f"{saved.path}/tokenizer.json is not the run's tokenizer")
    return tokenizer


def check_weights(model: LanguageModel, found: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise CheckpointError, naming the first difference, if weights of these shapes are
    not of this model."""
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"checkpoint {path} is of another model: {name} is "
                f"{found.get(name, 'absent')} there and {expected.get(name, 'absent')} here",
                "use the model settings of that run",
            )
