"""What a run starts from: the model, tokenizer and weights of a folder, or of the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dtt.config.data import TokenizerFile
from dtt.config.model import AnyModel, HfModel, Model
from dtt.config.schema import Config
from dtt.config.yaml_text import parse_yaml
from dtt.dist import Runtime
from dtt.errors import CheckpointError, ConfigError, DttError
from dtt.huggingface.families import Family
from dtt.huggingface.folder import AGAIN, FolderWeights, open_folder, open_named
from dtt.huggingface.given import with_given
from dtt.huggingface.hub import NAME, bring
from dtt.huggingface.proof import prove, require_transformers
from dtt.huggingface.settings import from_json
from dtt.machine import memory
from dtt.model.decoder import Decoder
from dtt.model.hf.settings import complete
from dtt.model.language_model import LanguageModel
from dtt.parallel.model import Reader
from dtt.runs import scan
from dtt.training.folder import run_folder
from dtt.training.load import saved_config
from dtt.training.saved import read


@dataclass(frozen=True)
class Origin:
    """A folder of `transformers`, on this disk."""

    folder: Path
    name: str
    """What init_from is from now on: the folder, or ORG/NAME@COMMIT."""


def with_origin(config: Config, fresh: bool = False) -> Config:
    """Return the configuration with the model and the tokenizer that its `init_from` has; itself
    where it has none. The same again changes nothing.

    The tokenizer is the folder's unless one is set. A model of the Hub is downloaded, and its
    commit becomes a part of `init_from`: that which the run of this name has recorded, unless the
    run is to begin afresh. A run that has a checkpoint needs the folder no more: where it cannot be
    had, model and tokenizer are those of the run. Raises ConfigError for settings that contradict
    the folder, and CheckpointError for what is no such folder.
    """
    if isinstance(config.model, HfModel):
        return _with_their_model(config, config.model, fresh)
    if config.init_from is None:
        return config
    try:
        origin = _find(config, fresh)
        model, _ = _read_settings(origin.folder, config.init_ignore_code)
    except CheckpointError:
        recorded = None if fresh else _recorded(config)
        if recorded is None:
            raise
        return _as_recorded(config, recorded)
    changes: dict[str, Any] = {
        "init_from": origin.name,
        "model": with_given(model, config.model, str(origin.folder)),
    }
    if "tokenizer" not in config.model_fields_set:
        changes["tokenizer"] = _tokenizer(origin.folder)
    return config.model_copy(update=changes)


def _recorded(config: Config) -> Config | None:
    """The settings of the newest checkpoint of the run of this name; None: it has none, or did not
    begin with a model."""
    paths = [] if config.name is None else scan(run_folder(config) / "checkpoints")
    for path in paths:
        with suppress(DttError):  # training will say what is wrong with it
            found = saved_config(read(path, ()))
            return found if found.is_described_elsewhere else None
    return None


def _as_recorded(config: Config, recorded: Config) -> Config:
    """Return the configuration with the model and the tokenizer of its run, not of a folder."""
    folder, named = run_folder(config), config.init_from
    before = recorded.init_from or ""
    changes: dict[str, Any] = {
        "init_from": before if before.partition("@")[0] == named else named,
        "model": _given_again(recorded.model, config.model, str(folder)),
    }
    tokenizer = recorded.tokenizer
    if "tokenizer" not in config.model_fields_set or config.tokenizer == tokenizer:
        if isinstance(tokenizer, TokenizerFile):
            tokenizer = tokenizer.model_copy(update={"path": folder / "tokenizer.json"})
        changes["tokenizer"] = tokenizer
    return config.model_copy(update=changes)


def _given_again(recorded: AnyModel, given: AnyModel, where: str) -> AnyModel:
    """Return the model of a run with what is set beside it."""
    if isinstance(recorded, Model) and isinstance(given, Model):
        return with_given(recorded, given, where)
    return recorded


def _with_their_model(config: Config, model: HfModel, fresh: bool) -> Config:
    """Return the configuration with the complete settings of its model of `transformers`."""
    require_transformers("model.name hf", "")
    if config.init_from is None:
        if model.architecture is None:
            raise ConfigError(
                "model.name hf needs model.architecture, or init_from",
                "give a model_type (gpt2, llama, ...), a folder or ORG/NAME",
            )
        try:
            found_model = _described(model, config.init_ignore_code)
        except DttError:
            recorded = None if fresh else _recorded(config)
            if recorded is None or _architecture(recorded) in (None, model.architecture):
                raise
            return _as_recorded(config, recorded)  # what described it is not here any more
        return config.model_copy(update={"model": found_model})
    try:
        origin = _find(config, fresh)
        found = _config_json(origin.folder, config.init_ignore_code)
    except CheckpointError:
        recorded = None if fresh else _recorded(config)
        if recorded is None:
            raise
        return _as_recorded(config, recorded)
    kind = str(found.get("model_type"))
    if model.architecture not in (None, kind):
        raise ConfigError(
            f"model.architecture is {model.architecture}, and {origin.folder} is {kind}",
            "leave it out: init_from says what the model is",
        )
    where = str(origin.folder / "config.json")
    changes: dict[str, Any] = {
        "init_from": origin.name,
        "model": complete(model, kind, found, where, with_weights=True),
    }
    if "tokenizer" not in config.model_fields_set:
        changes["tokenizer"] = _tokenizer(origin.folder)
    return config.model_copy(update=changes)


def _architecture(config: Config) -> str | None:
    return config.model.architecture if isinstance(config.model, HfModel) else None


def _described(model: HfModel, ignore_code: bool) -> HfModel:
    """Return the complete settings of an architecture, a folder or a model of the Hub."""
    named = model.architecture or ""
    if Path(named).is_dir():
        folder = Path(named)
    elif NAME.fullmatch(named.partition("@")[0]):
        name, _, revision = named.partition("@")
        folder, _ = bring(name, revision or None, ("config.json",))
    else:
        return complete(model, named)
    found = _config_json(folder, ignore_code)
    return complete(model, str(found.get("model_type")), found, str(folder / "config.json"))


def initial_weights(
    config: Config, model: LanguageModel, runtime: Runtime, note: Callable[[str], None]
) -> Reader:
    """Return the weights that a configuration of `with_origin` starts from, for all ranks.

    `model` is the whole one, without memory. The main rank compares the logits with those of
    `transformers` where it is installed; CheckpointError: they differ, or the folder is damaged.
    """
    origin = _find(config, fresh=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if isinstance(config.model, HfModel):
        runtime.on_main(lambda: note(f"starting from {origin.folder}, by its own names"))
        return open_named(origin.folder, shapes, str(config.model.architecture))
    _, family = _read_settings(origin.folder, config.init_ignore_code)
    weights = open_folder(origin.folder, family, config.model, shapes)
    runtime.on_main(lambda: _compare(weights, family, note))
    return weights


def _compare(weights: FolderWeights, family: Family, note: Callable[[str], None]) -> None:
    count = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
    (free, total), needed = memory(), 8 * count
    start = f"starting from {weights.folder} ({family.architecture}): "
    if find_spec("transformers") is None:
        note(f"{start}not compared with transformers, which is not installed")
    elif total and needed > free:
        note(f"{start}not compared with transformers, for want of {needed / 1e9:,.1f} GB of memory")
    else:
        with torch.device("meta"):
            ours = Decoder(weights.model)
        ours.load_state_dict(weights.whole(), assign=True)
        ours.reset()
        proof = prove(weights.folder, family, ours.eval())
        note(f"{start}its logits are those of transformers, to {proof}")


def _find(config: Config, fresh: bool) -> Origin:
    named = config.init_from or ""
    if Path(named).exists():
        return Origin(Path(named), named)
    name, _, revision = named.partition("@")
    if not NAME.fullmatch(name):
        raise CheckpointError(
            f"init_from: {named} does not exist, and is no ORG/NAME of the Hub", "check the path"
        )
    if not revision and not fresh:
        before, _, revision = _recorded_name(config).partition("@")
        if before == name and not revision:
            raise CheckpointError(
                f"init_from: {named}, a folder when this run began, is gone",
                "check the path",
            )
        revision = revision if before == name else ""
    folder, commit = bring(name, revision or None)
    return Origin(folder, f"{name}@{commit}")


def _recorded_name(config: Config) -> str:
    """What the run of this name began with: a folder, or ORG/NAME@COMMIT, of which the Hub may have
    a newer commit by now; empty: there is no such run."""
    path = run_folder(config) / "config.yaml" if config.name else Path("config.yaml")
    if config.name is None or not path.is_file():
        return ""
    tree = parse_yaml(path.read_text(encoding="utf-8"), str(path)).tree
    return str(tree.get("init_from") or "")


def _read_settings(folder: Path, ignore_code: bool) -> tuple[Any, Family]:
    where = folder / "config.json"
    config = _config_json(folder, ignore_code)
    with _damage(where):
        return from_json(config, str(where))


def _config_json(folder: Path, ignore_code: bool) -> dict[str, Any]:
    """Return what a folder's config.json says. ConfigError: the folder has code of its own."""
    if not folder.is_dir():
        raise CheckpointError(f"init_from: {folder} is not a folder", "name the folder of a model")
    where = folder / "config.json"
    if not where.is_file():
        is_run = (folder / "checkpoints").is_dir()
        fix = "--resume starts from a run of dtt" if is_run else "name the folder of a model"
        raise CheckpointError(f"{folder} lacks config.json: it is no model of transformers", fix)
    config = _json(where)
    if config.get("auto_map") and not ignore_code:
        raise ConfigError(
            f"{folder} has code of its own (auto_map in config.json), which dtt does not run: its "
            "weights may mean something else than its model_type says",
            "if they do not, set init_ignore_code: the weights are read, and compared with "
            "transformers' own model",
        )
    return config


def _tokenizer(folder: Path) -> TokenizerFile:
    path, about = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no tokenizer.json", "name one with --tokenizer FILE, or char or byte"
        )
    end = _json(about).get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if not isinstance(end, str | None):
        raise CheckpointError(f"{about} is damaged: eos_token is {end!r}", AGAIN)
    with _damage(path):
        return TokenizerFile(path=path, end_of_text=end if end and _knows(path, end) else None)


def _knows(path: Path, name: str) -> bool:
    """Whether a tokenizer.json has a token of this name."""
    data = _json(path)
    added = {token.get("content") for token in data.get("added_tokens") or []}
    vocabulary = (data.get("model") or {}).get("vocab") or {}
    return name in added or name in vocabulary


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Say of values of another type than they should be that this file is damaged."""
    try:
        yield
    except (TypeError, AttributeError, ValueError, KeyError) as error:
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is damaged: {what}", AGAIN) from error


def _json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON; empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", AGAIN) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: it holds no object", AGAIN)
    return found
