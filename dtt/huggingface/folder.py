"""Weights in a folder of Hugging Face, read as if they were a checkpoint of dtt's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dtt.config.model import Model
from dtt.errors import CheckpointError
from dtt.huggingface.families import Family
from dtt.huggingface.pieces import Piece, pieces, zero_biases
from dtt.parallel.part import Part
from dtt.training.stored import shared_blocks

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
NUMBERS = {"F64", "F32", "F16", "BF16"}
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")
"""What older folders hold beside weights: tables that follow from the settings."""
AGAIN = "download it again"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class FolderWeights:
    """The tensors of a folder under dtt's names, of which parts can be read (a `Reader`)."""

    folder: Path
    family: Family
    model: Model
    shapes: Shapes
    """Of our whole tensors."""
    files: dict[str, tuple[Any, str]]
    """By their name the open file that has a tensor, and its name in it."""

    def read(self, name: str, part: Part) -> Tensor:
        """Return a part of our tensor `name` in fp32; nothing else of the folder is read.

        CheckpointError: a file is damaged, or a value is not finite.
        """
        found = torch.zeros(part.local_shape)
        if name.endswith("router.bias"):  # it balances experts in training, and starts at zero
            return found
        for piece in pieces(self.family, self.model, name, part.shape):
            for here, there in shared_blocks(part, piece.part):
                places = there[1:] if piece.stacked else there
                places = places[::-1] if piece.transposed else places
                file, inner = self.files[piece.name]
                with _damage(self.folder, inner):
                    block = file.get_slice(inner)[places]
                block = block.t() if piece.transposed else block
                found[here] = block[None] if piece.stacked else block
        if not bool(found.isfinite().all()):
            raise CheckpointError(
                f"{self.folder} is damaged: {name} has values that are not finite", AGAIN
            )
        return found

    def whole(self) -> dict[str, Tensor]:
        """Return all our tensors."""
        return {name: self.read(name, Part.all_of(shape)) for name, shape in self.shapes.items()}


def open_folder(folder: Path, family: Family, model: Model, shapes: Shapes) -> FolderWeights:
    """Open the safetensors files of a folder that must hold our tensors `shapes`, and no others.

    Only headers are read. CheckpointError says what is missing or foreign: which file, which
    tensor, which shape.
    """
    files = _open_files(folder)
    if not any(name.startswith(family.prefix) for name in files):
        files = {_with_prefix(name, family): file for name, file in files.items()}
    expected = {
        piece.name: piece
        for name, shape in shapes.items()
        if not name.endswith("router.bias")
        for piece in pieces(family, model, name, shape)
    }
    for piece in expected.values():
        _check(folder, piece, files)
    zeros = {piece.name for piece in zero_biases(family, model, dict(shapes))}
    for name in sorted(files.keys() - expected.keys()):
        _refuse_foreign(folder, name, files, zeros, model, family)
    return FolderWeights(folder, family, model, shapes, files)


@dataclass(frozen=True)
class NamedWeights:
    """The tensors of a folder under their own names (a `Reader`)."""

    folder: Path
    files: dict[str, tuple[Any, str]]

    def read(self, name: str, part: Part) -> Tensor:
        """Return a part of a tensor in fp32; nothing else of the folder is read."""
        found = torch.zeros(part.local_shape)
        file, inner = self.files[name]
        with _damage(self.folder, inner):
            stored = file.get_slice(inner)
            for there, here in part.boxes():
                found[here] = stored[there] if there else file.get_tensor(inner)
        return found


def open_named(folder: Path, shapes: Shapes, kind: str) -> NamedWeights:
    """Open the safetensors files of a folder that must hold tensors of these names and shapes.

    Only headers are read. Names may lack what all of them but the head's begin with, as in folders
    of a model without its head. CheckpointError says what is missing, or is there beside them.
    """
    files = _open_files(folder)
    if not any(name in files for name in shapes):
        prefix = next(iter(shapes)).partition(".")[0] + "."
        files = {name if name in shapes else prefix + name: file for name, file in files.items()}
    for name, shape in shapes.items():
        _check(folder, Piece(name, Part.all_of(shape)), files)
    for name in sorted(files.keys() - shapes.keys()):
        if not BUFFERS.search(name) and not _is_another(name, shapes, files):
            raise CheckpointError(
                f"{folder} has a tensor {name}, which {kind} as config.json describes it has not",
                "config.json is of another model",
            )
    return NamedWeights(folder, files)


def _is_another(name: str, shapes: Shapes, files: dict[str, tuple[Any, str]]) -> bool:
    """Whether a tensor is one of `shapes` once more, as a tied head is the embedding."""
    file, inner = files[name]
    shape = tuple(file.get_slice(inner).get_shape())
    for other in (n for n, s in shapes.items() if s == shape and len(s) == 2):
        where, theirs = files[other]
        if torch.equal(file.get_tensor(inner), where.get_tensor(theirs)):
            return True
    return False


def _with_prefix(name: str, family: Family) -> str:
    return name if name.startswith("lm_head.") else family.prefix + name


def _open_files(folder: Path) -> dict[str, tuple[Any, str]]:
    """Return by name which open file has a tensor, and its name there."""
    names = _file_names(folder)
    found: dict[str, tuple[Any, str]] = {}
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}, which {INDEX} names", AGAIN)
        with _damage(folder, name):
            file: Any = safe_open(folder / name, framework="pt")
            found |= {tensor: (file, tensor) for tensor in file.keys()}  # noqa: SIM118
    return found


def _file_names(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        try:
            places = json.loads((folder / INDEX).read_bytes())["weight_map"]
            names = sorted({str(name) for name in places.values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{folder}/{INDEX} is damaged", AGAIN) from None
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{folder}/{INDEX} names files outside of the folder")
        return names
    if (folder / SINGLE).is_file():
        return [SINGLE]
    pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder} has its weights as pickles only ({pickled[0]}), which can run code when "
            "they are opened; dtt never opens one",
            "take a revision of the model with safetensors",
        )
    raise CheckpointError(f"{folder} lacks {SINGLE} (or {INDEX})", AGAIN)


def _check(folder: Path, piece: Piece, files: dict[str, tuple[Any, str]]) -> None:
    if piece.name not in files:
        raise CheckpointError(
            f"{folder} lacks the tensor {piece.name} {list(piece.shape)}",
            "config.json is of another model, or a file of the weights is",
        )
    file, name = files[piece.name]
    stored = file.get_slice(name)
    if tuple(stored.get_shape()) != piece.shape:
        raise CheckpointError(
            f"{folder}: {piece.name} is {list(stored.get_shape())}, and config.json says "
            f"{list(piece.shape)}",
            "one of the two is of another model",
        )
    if stored.get_dtype() not in NUMBERS:
        raise CheckpointError(
            f"{folder}: {piece.name} is {stored.get_dtype()}: the weights are quantized",
            "take the original model",
        )


def _refuse_foreign(
    folder: Path,
    name: str,
    files: dict[str, tuple[Any, str]],
    zeros: set[str],
    model: Model,
    family: Family,
) -> None:
    """Raise CheckpointError for a tensor that dtt's decoder has no place for."""
    if BUFFERS.search(name):
        return
    file, inner = files[name]
    if name in zeros:
        if not bool(file.get_tensor(inner).any()):
            return
        raise CheckpointError(
            f"{folder}: {name} is not zero, and config.json says that there are no biases",
            "dtt's decoder has biases everywhere or nowhere",
        )
    if name == "lm_head.weight" and model.tied_head:
        (embed,) = family.names["embed"]
        other, theirs = files[f"{embed}.weight"]
        if torch.equal(file.get_tensor(inner), other.get_tensor(theirs)):
            return
        raise CheckpointError(
            f"{folder}: lm_head.weight is not the embedding, and config.json says that it is "
            "(tie_word_embeddings)",
            "set it to false there",
        )
    raise CheckpointError(
        f"{folder} has a tensor {name}, which {family.architecture} as config.json describes it "
        "has not",
        "config.json is of another model, or dtt's decoder cannot be this one",
    )


@contextmanager
def _damage(folder: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is damaged: {name}: {error}", AGAIN) from error
