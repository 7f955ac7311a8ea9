"""A run's model as a folder for others: written under a temporary name, proven, then renamed."""

from __future__ import annotations

import json
import secrets
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtt import storage
from dtt.config.model import HfModel, Model
from dtt.config.schema import Config
from dtt.config.yaml_text import write_yaml
from dtt.errors import EXIT_DONE, CheckpointError, ConfigError, DttError
from dtt.huggingface import hub
from dtt.huggingface.card import card, portable
from dtt.huggingface.choice import family_of
from dtt.huggingface.families import Family
from dtt.huggingface.folder import open_folder
from dtt.huggingface.pieces import Piece, pieces, whole, zero_biases
from dtt.huggingface.proof import prove, require_transformers
from dtt.huggingface.settings import to_json
from dtt.huggingface.theirs import architecture_of, prove_same, theirs_json
from dtt.huggingface.tokenizers import first_difference, tokenizer_files
from dtt.huggingface.writer import Row, write_weights
from dtt.model.decoder import Decoder
from dtt.model.kinds import empty_model
from dtt.model.language_model import LanguageModel
from dtt.parallel.part import Part
from dtt.precision import DTYPES
from dtt.runs import find_run
from dtt.tokenizer import Tokenizer
from dtt.training.load import check_weights, saved_config, saved_tokenizer
from dtt.training.saved import Saved, open_checkpoint

MARKS = ("config.json", "config.yaml", "README.md")
"""What a folder has of which --force may take the place."""


@dataclass
class Export:
    """What is exported, where to, and what of it has been proven."""

    saved: Saved
    config: Config
    tokenizer: Tokenizer
    run: Path
    family: Family | None
    """What dtt's decoder becomes; None: tensors keep the names that they have in the run."""
    theirs: str | None
    """The class of a model that is one of `transformers` already."""
    dtype: torch.dtype
    proven: dict[str, str] = field(default_factory=dict)
    """What it is of, and what was found, in words."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.saved.shapes("model")

    def pieces_of(self, name: str, shape: tuple[int, ...]) -> list[Piece]:
        if self.family is None or not isinstance(self.config.model, Model):
            return whole(name, shape)
        return pieces(self.family, self.config.model, name, shape)

    @property
    def architecture(self) -> str | None:
        """The class of `transformers` that opens the folder; None: dtt's own names."""
        return self.family.architecture if self.family else self.theirs

    def rows(self) -> list[Row]:
        """Return every tensor to write, with what reads it."""
        made = [
            Row(piece, partial(self._read, name, piece))
            for name, shape in self._ordered()
            for piece in self.pieces_of(name, shape)
        ]
        if self.family is not None and isinstance(self.config.model, Model):
            missing = zero_biases(self.family, self.config.model, self.shapes)
            made += [Row(piece, partial(torch.zeros, piece.shape)) for piece in missing]
        return made

    def _ordered(self) -> list[tuple[str, tuple[int, ...]]]:
        """Our tensors in the order of the model, since files of a large one are read in order."""
        shapes = self.shapes
        return [(name, shapes[name]) for name in empty_model(self.config.model).state_dict()]

    def _read(self, name: str, piece: Piece) -> Tensor:
        part = self.saved.part("model", name, piece.part)
        if not bool(part.isfinite().all()):
            raise CheckpointError(
                f"checkpoint {self.saved.path}: {name} has values that are not finite",
                "export one from before that",
            )
        return piece.from_ours(part)

    def model(self) -> LanguageModel:
        """Return our model with the values that are exported, in fp32."""
        model = empty_model(self.config.model)
        values = {
            name: self.saved.part("model", name, Part.all_of(shape)).to(self.dtype).float()
            for name, shape in self.shapes.items()
        }
        model.load_state_dict(values, assign=True)
        model.reset()
        return model.eval()


def open_export(path: Path | None, checkpoint: str, to: str, dtype: str) -> Export:
    """Open a run's checkpoint for export. ConfigError: no stock architecture is this model."""
    run = find_run(path)
    saved = open_checkpoint(path or run, checkpoint, ("model",))
    config = saved_config(saved)
    check_weights(empty_model(config.model), saved.shapes("model"), saved.path)
    family, theirs = None, None
    if to == "hf" and isinstance(config.model, Model):
        family = family_of(config.model)
    elif to == "hf" and isinstance(config.model, HfModel):
        theirs = architecture_of(config.model)
    return Export(saved, config, saved_tokenizer(saved), run, family, theirs, DTYPES[dtype])


def write_export(
    export: Export, folder: Path, *, verify: bool = True, push: str | None = None
) -> None:
    """Write `folder` durably, and prove it: with `verify` its logits are those of dtt, as
    `transformers` computes them, and its tokens are.

    Nothing has the name `folder` before that, and what had it goes then. Its card says how to load
    it: from the Hub if it will be there as `push`. CheckpointError: the logits differ; it names the
    part that is the first to drift.
    """
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    storage.make_folder(temporary)
    try:
        write_weights(temporary, export.rows(), export.dtype)
        if export.architecture is None:
            _write_own(export, temporary)
        else:
            _write_stock(export, temporary, verify)
        label = export.architecture
        usable = label is not None and (temporary / "tokenizer.json").exists()
        text = card(
            export.saved,
            export.config,
            export.run,
            family=label,
            proven=export.proven,
            loaded=(push or folder.name) if usable else None,
        )
        storage.write_atomic(temporary / "README.md", text)
        _put(temporary, folder)
    except CheckpointError as error:
        raise CheckpointError(error.what.replace(str(temporary), str(folder)), error.fix) from error
    finally:
        with suppress(DttError, OSError):
            if temporary.exists():
                storage.remove(temporary)


def _put(temporary: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
    if folder.exists():
        storage.rename(folder, old)
    storage.rename(temporary, folder)
    if old.exists():
        storage.remove(old)


def _write_own(export: Export, folder: Path) -> None:
    """dtt's names: config.yaml and tokenizer.json make it complete; every value is read back."""
    storage.write_atomic(folder / "config.yaml", write_yaml(portable(export.config)))
    storage.write_atomic(folder / "tokenizer.json", export.tokenizer.to_json())
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file: Any = safe_open(path, framework="pt")
        found |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    for name, shape in export.shapes.items():
        expected = export.saved.part("model", name, Part.all_of(shape)).to(export.dtype)
        if not torch.equal(found[name][:], expected):
            raise CheckpointError(f"{folder}: {name} was not written as it is", "check the disk")
    export.proven["read back"] = "every value is that of the run"


def _write_stock(export: Export, folder: Path, verify: bool) -> None:
    """What `transformers` opens; with `verify`, logits and tokens are compared."""
    model, tokenizer, family = export.config.model, export.tokenizer, export.family
    end = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
    generation = {"_from_model_config": True, **end, "pad_token_id": tokenizer.end_of_text}
    own = export.config.tokenizer.name != "file"
    files = {
        "config.json": json.dumps(_config_json(export), indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        **tokenizer_files(tokenizer, own, model.context),
    }
    for name, text in files.items():
        storage.write_atomic(folder / name, text)
    if family is not None and isinstance(model, Model):
        open_folder(folder, family, model, export.shapes)  # as init_from will
    if not verify:
        return
    ours = export.model()
    if family is not None and isinstance(ours, Decoder):
        proof = prove(folder, family, ours)
        export.proven["logits"] = f"those of transformers differ from dtt's by at most {proof}"
    else:
        export.proven["logits"] = prove_same(folder, str(export.theirs), ours)
    difference = first_difference(folder, tokenizer, own)
    if difference is None:
        export.proven["tokenizer"] = "transformers gives the tokens of dtt"
        return
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        storage.remove(folder / name)
    _warn(f"the tokenizer is left out, since transformers does not read text alike: {difference}")


def _config_json(export: Export) -> dict[str, Any]:
    model, end = export.config.model, export.tokenizer.end_of_text
    kind = str(export.dtype).removeprefix("torch.")
    if export.family is not None and isinstance(model, Model):
        return to_json(model, export.family, end, kind)
    assert isinstance(model, HfModel)
    return theirs_json(model, end, kind)


def export_command(
    *,
    run: Path | None,
    to: str,
    output: Path | None,
    checkpoint: str,
    dtype: str,
    push: str | None,
    force: bool,
    verify: bool,
) -> int:
    """Write the folder, say what was proven of it, and upload it if asked; return the exit code."""
    if push is not None:
        hub.refuse_bad_name(push)
    if to == "hf" and verify:
        require_transformers("checking the exported model", "give --no-verify")
    export = open_export(run, checkpoint, to, dtype)
    folder = output or Path("exports") / f"{export.config.name or export.run.name}-{to}"
    _refuse_folder(folder, force)
    write_export(export, folder, verify=verify, push=push)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    family = export.architecture or "dtt's own names"
    print(f"{export.run}, step {export.saved.step}: {folder}")
    print(f"  {'weights':<10} {family}, {dtype}, {size / 1e6:,.1f} MB")
    for name, what in export.proven.items():
        print(f"  {name:<10} {what}")
    if to == "hf" and not verify:
        _warn("neither logits nor tokens were compared with those of transformers (--no-verify)")
    if push is not None:
        address = hub.send(folder, push, f"Step {export.saved.step}, exported by dtt")
        print(f"  {'pushed':<10} {address}")
    return EXIT_DONE


def _refuse_folder(folder: Path, force: bool) -> None:
    """Raise ConfigError if the folder is there and must not be replaced."""
    here = Path.cwd()
    if folder.resolve() in (here, *here.parents):
        raise ConfigError(
            f"{folder} is the folder that you are in, or above it, and an export takes the place "
            "of a whole folder",
            "give -o the name of a new one",
        )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not force:
        raise ConfigError(f"{folder} is there already", "give --force, or another -o FOLDER")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    is_run = (folder / "checkpoints").exists() or (folder / "manifest.json").exists()
    weights = any(name.endswith(".safetensors") for name in names)
    if is_run or not weights or not names & set(MARKS):
        raise ConfigError(
            f"{folder} is no exported model, and --force replaces nothing else",
            "give another -o FOLDER",
        )


def _warn(text: str) -> None:
    print(f"dtt export: warning: {text}", file=sys.stderr, flush=True)
