"""Tensors on their way to disk: one deep copy in reused buffers, streamed to a safetensors file.

The format is safetensors' (8 bytes of header length, a JSON header, the raw buffers); the writer
is ours so that a large state is hashed and written in one pass, without a second copy of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from dtt.errors import CheckpointError
from dtt.parallel.part import Part
from dtt.storage import Written, write_stream
from dtt.training.stored import PARTS

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What a checkpoint holds, and the name of it in a safetensors header."""

Rows = dict[str, list[Any]]
"""By name a tensor's type, its whole shape, and the sum of its bits read as integers."""

INTEGERS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True)
class Group:
    """Tensors of one file: each storage once in `tensors`, its further names in `tied`."""

    tensors: dict[str, Tensor]
    tied: dict[str, str]
    parts: dict[str, Part] = field(default_factory=dict)
    """What each tensor is of the whole one, where ranks divide them."""


def untie(tensors: Mapping[str, Tensor]) -> Group:
    """Find the names that are one tensor (tied weights), so that it is stored once.

    Raises CheckpointError for a tensor that safetensors cannot hold (sparse, meta, complex).
    """
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            what = f"tensor {name} cannot be saved: {tensor.dtype}, {tensor.layout}, "
            raise CheckpointError(f"{what}on {tensor.device}", "keep it out of the state")
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = seen.setdefault(place, name) if tensor.numel() else name
        if first == name:
            kept[name] = tensor.detach()
        else:
            tied[name] = first
    return Group(kept, tied)


class Staging:
    """CPU buffers for a copy of the state, kept from one save to the next."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def reserve(self, groups: Mapping[str, Group]) -> None:
        """Allocate the buffers for `groups` and touch each page, which costs more than a copy."""
        for group, content in groups.items():
            for name, tensor in content.tensors.items():
                buffer = self._buffers[group, name] = _buffer(tensor)
                buffer.reshape(-1).view(torch.uint8).numpy()[::4096] = 0

    def copy(self, groups: Mapping[str, Group]) -> dict[str, Group]:
        """Return a deep copy of the groups, complete when this returns; it aliases nothing live.

        The copy is valid until the next call. Tensors of a GPU go through pinned memory.
        """
        old, self._buffers = self._buffers, {}
        copies: dict[str, Group] = {}
        devices = set()
        for group, content in groups.items():
            tensors = {}
            for name, tensor in content.tensors.items():
                buffer = old.get((group, name))
                if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                    buffer = _buffer(tensor)
                buffer.copy_(tensor, non_blocking=True)
                if tensor.is_cuda:
                    devices.add(tensor.device)
                tensors[name] = self._buffers[group, name] = buffer
            copies[group] = Group(tensors, content.tied, content.parts)
        for device in devices:
            torch.cuda.synchronize(device)
        return copies


def _buffer(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def write_tensors(path: Path, group: Group) -> tuple[Written, Rows]:
    """Write a safetensors file, synced; return what was written and what enters its digest.

    One tensor at a time is brought to contiguous CPU memory if it is not there already.
    """
    # safetensors' own order: widest type first, so that every buffer is aligned.
    order = sorted(group.tensors, key=lambda name: (-group.tensors[name].itemsize, name))
    sums: dict[str, int] = {}

    def chunks() -> Iterator[bytes | memoryview]:
        kinds = [(name, group.tensors[name].dtype, group.tensors[name].shape) for name in order]
        yield header(_about(group), kinds)
        for name in order:
            tensor = group.tensors[name].cpu().contiguous().reshape(-1)
            sums[name] = _bit_sum(tensor)
            yield tensor.view(torch.uint8).numpy().data

    written = write_stream(path, chunks(), hashing=blake3)
    rows = {}
    for name, tensor in group.tensors.items():
        shape = group.parts[name].shape if name in group.parts else tensor.shape
        rows[name] = _row(tensor, list(shape), sums[name])
    rows |= {alias: rows[name] for alias, name in group.tied.items()}
    return written, rows


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of names, types, shapes and every bit of the values; cheap (GB/s).

    Values enter as the sum of their bits read as integers, so the parts of a sharded tensor add
    up to the digest of the whole. It finds damage, not forgery, which a file's hash is for.
    """
    rows = {n: _row(t, list(t.shape), _bit_sum(t.detach().cpu())) for n, t in tensors.items()}
    return digest_of([rows])


def digest_of(files: Iterable[Rows]) -> str:
    """Return `digest` of the whole tensors whose parts are in these files."""
    found: Rows = {}
    for rows in files:
        for name, (kind, shape, bits) in rows.items():
            before = found[name][2] if name in found else 0
            found[name] = [kind, shape, (before + bits + 2**63) % 2**64 - 2**63]  # as int64 wraps
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _row(tensor: Tensor, shape: list[int], bits: int) -> list[Any]:
    return [DTYPES[tensor.dtype], shape, bits]


def _bit_sum(tensor: Tensor) -> int:
    # NumPy and not torch: a parallel reduction here would take threads from the training step.
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return int(flat.view(INTEGERS[tensor.itemsize]).sum(dtype=np.int64))


def _about(group: Group) -> dict[str, str]:
    rows = {name: [part.shape, part.ranges] for name, part in group.parts.items()}
    return {"format": "pt"} | ({PARTS: json.dumps(rows)} if rows else {})


def header(
    about: Mapping[str, str], tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]]
) -> bytes:
    """Return the beginning of a safetensors file: what it is `about`, and name, type and shape of
    the tensors, whose values follow in this order without gaps."""
    rows: dict[str, object] = {"__metadata__": dict(about)}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        rows[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
