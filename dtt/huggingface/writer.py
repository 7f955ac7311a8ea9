"""Weights on their way into safetensors files: one tensor in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dtt import storage
from dtt.errors import ConfigError
from dtt.huggingface.pieces import Piece
from dtt.precision import DTYPES
from dtt.training.snapshot import header

LARGEST_FILE = 5_000_000_000
"""Bytes of a file, unless one tensor is larger; more become several files with an index."""


@dataclass(frozen=True)
class Row:
    """A tensor to write, and what makes it when its turn has come."""

    piece: Piece
    make: Callable[[], Tensor]


def write_weights(
    folder: Path, rows: list[Row], dtype: torch.dtype, largest: int = LARGEST_FILE
) -> int:
    """Write model.safetensors into `folder`, or numbered files with an index; return its bytes.

    All values are finite. ConfigError: one is too large for `dtype`.
    """
    size = dtype.itemsize
    files = _divided(rows, size, largest)
    for number, part in enumerate(files, 1):
        storage.write_stream(folder / _name(number, len(files)), _chunks(part, dtype))
    total = sum(_elements(row) * size for row in rows)
    if len(files) > 1:
        places = {
            row.piece.name: _name(number, len(files))
            for number, part in enumerate(files, 1)
            for row in part
        }
        index = {"metadata": {"total_size": total}, "weight_map": places}
        storage.write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=2))
    return total


def _elements(row: Row) -> int:
    return math.prod(row.piece.shape)


def _name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number:05}-of-{total:05}.safetensors"


def _divided(rows: list[Row], size: int, largest: int) -> list[list[Row]]:
    files: list[list[Row]] = [[]]
    filled = 0
    for row in rows:
        more = _elements(row) * size
        if files[-1] and filled + more > largest:
            files.append([])
            filled = 0
        files[-1].append(row)
        filled += more
    return files


def _chunks(rows: list[Row], dtype: torch.dtype) -> Iterator[bytes | memoryview]:
    yield header({"format": "pt"}, [(row.piece.name, dtype, row.piece.shape) for row in rows])
    for row in rows:
        tensor = row.make().to(dtype).contiguous()
        if not bool(tensor.isfinite().all()):
            raise _too_large(row.piece.name, dtype)
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


def _too_large(name: str, dtype: torch.dtype) -> ConfigError:
    (kind,) = (kind for kind, one in DTYPES.items() if one == dtype)
    wider = "bf16 or fp32" if dtype == torch.float16 else "fp32"
    return ConfigError(f"--dtype {kind}: a value of {name} is too large for it", f"use {wider}")
