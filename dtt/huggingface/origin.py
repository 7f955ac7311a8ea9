"""What a run starts from: the model, tokenizer and weights of a folder, or of the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dtt.config.data import TokenizerFile
from dtt.config.model import HfModel
from dtt.config.schema import Config
from dtt.config.yaml_text import parse_yaml
from dtt.dist import Runtime
from dtt.errors import CheckpointError, ConfigError
from dtt.huggingface.families import Family
from dtt.huggingface.folder import FolderWeights, open_folder, open_named
from dtt.huggingface.given import with_given
from dtt.huggingface.hub import NAME, bring
from dtt.huggingface.proof import prove, require_transformers
from dtt.huggingface.settings import from_json
from dtt.model.decoder import Decoder
from dtt.model.hf.settings import complete
from dtt.model.language_model import LanguageModel
from dtt.parallel.model import Reader
from dtt.training.folder import run_folder


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
    run is to begin afresh. Raises ConfigError for settings that contradict the folder, and
    CheckpointError for what is no such folder.
    """
    if isinstance(config.model, HfModel):
        return _with_their_model(config, config.model, fresh)
    if config.init_from is None:
        return config
    origin = _find(config, fresh)
    model, _ = _read_settings(origin.folder, config.init_ignore_code)
    changes: dict[str, Any] = {
        "init_from": origin.name,
        "model": with_given(model, config.model, str(origin.folder)),
    }
    if "tokenizer" not in config.model_fields_set:
        changes["tokenizer"] = _tokenizer(origin.folder)
    return config.model_copy(update=changes)


def _with_their_model(config: Config, model: HfModel, fresh: bool) -> Config:
    """Return the configuration with the complete settings of its model of `transformers`."""
    require_transformers("model.name hf", "")
    if config.init_from is None:
        if model.architecture is None:
            raise ConfigError(
                "model.name hf needs model.architecture, or init_from",
                "give a model_type (gpt2, llama, ...), a folder or ORG/NAME",
            )
        return config.model_copy(update={"model": _described(model, config.init_ignore_code)})
    origin = _find(config, fresh)
    found = _config_json(origin.folder, config.init_ignore_code)
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
    free, needed = _free_memory(), 8 * count
    start = f"starting from {weights.folder} ({family.architecture}): "
    if find_spec("transformers") is None:
        note(f"{start}not compared with transformers, which is not installed")
    elif free is not None and needed > free:
        note(f"{start}not compared with transformers, for want of {needed / 1e9:.0f} GB of memory")
    else:
        with torch.device("meta"):
            ours = Decoder(weights.model)
        ours.load_state_dict(weights.whole(), assign=True)
        ours.reset()
        worst = prove(weights.folder, family, ours.eval())
        note(f"{start}its logits are those of transformers, to {worst:.0e} of their range")


def _free_memory() -> int | None:
    """Bytes that can be had without swapping; None: the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kilobytes[0]) * 1024 if kilobytes else None


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
        revision = _recorded_revision(config, name)
    folder, commit = bring(name, revision or None)
    return Origin(folder, f"{name}@{commit}")


def _recorded_revision(config: Config, name: str) -> str:
    """The commit that the run of this name began with; the Hub's newest may be another by now."""
    path = run_folder(config) / "config.yaml" if config.name else Path("config.yaml")
    if config.name is None or not path.is_file():
        return ""
    recorded = parse_yaml(path.read_text(encoding="utf-8"), str(path)).tree.get("init_from")
    before, _, revision = str(recorded).partition("@")
    return revision if before == name else ""


def _read_settings(folder: Path, ignore_code: bool) -> tuple[Any, Family]:
    return from_json(_config_json(folder, ignore_code), str(folder / "config.json"))


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
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no tokenizer.json", "name one with --tokenizer FILE, or char or byte"
        )
    end = _json(folder / "tokenizer_config.json").get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    return TokenizerFile(path=path, end_of_text=end if end and _knows(path, end) else None)


def _knows(path: Path, name: str) -> bool:
    """Whether a tokenizer.json has a token of this name."""
    data = _json(path)
    added = {token.get("content") for token in data.get("added_tokens") or []}
    vocabulary = (data.get("model") or {}).get("vocab") or {}
    return name in added or name in vocabulary


def _json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON; empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", "download it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: it holds no object", "download it again")
    return found
