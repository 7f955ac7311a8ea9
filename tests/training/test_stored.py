"""Tensors that ranks wrote in parts, read by ranks that divide them in another way."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from toy_run import checkpoints_in
from toy_run import (
    quick as quick,
)

from dtt.errors import CheckpointError
from dtt.parallel.part import Part, share_of
from dtt.training.checkpoint import Checkpoints
from dtt.training.saved import open_checkpoint
from dtt.training.snapshot import Group, write_tensors
from dtt.training.stored import StoredTensors

SHAPES: dict[str, tuple[int, ...]] = {
    "embed": (509, 6),
    "qkv": (24, 7),
    "experts": (4, 5, 3),
    "bias": (509,),
    "one": (1,),
    "step": (),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8)
Divided = list[dict[str, Part]]


def numbered(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor whose elements differ from their neighbours in any direction, exact in any type."""
    return (torch.arange(torch.Size(shape).numel()) * 7 % 127).view(shape).to(dtype)


def cut(draw: random.Random, parts: list[Part], depth: int) -> list[Part]:
    """Divide each part among some ranks along some dim, evenly or as torch.chunk does, and again;
    some of what is left is empty."""
    if not depth or not parts[0].shape:
        return parts
    found = []
    dim, ranks, even = draw.randrange(len(parts[0].shape)), draw.randint(1, 4), draw.random() < 0.5
    for part in parts:
        size = part.local_shape[dim]
        for rank in range(ranks):
            start, stop = share_of(size, ranks, rank)
            if even:
                start, stop = size * rank // ranks, size * (rank + 1) // ranks
            found.append(part.narrow(dim, start, stop))
    return cut(draw, found, depth - 1)


def interleaved(shape: tuple[int, ...], ranks: int) -> list[Part]:
    """As tensor parallelism divides q, k and v: each rank has a share of each third of the rows."""
    third, rest = shape[0] // 3, tuple(((0, size),) for size in shape[1:])
    ends = [(third * rank // ranks, third * (rank + 1) // ranks) for rank in range(ranks)]
    return [
        Part(shape, (tuple((third * i + a, third * i + b) for i in range(3)), *rest))
        for a, b in ends
    ]


def divisions(seed: int) -> dict[str, list[Part]]:
    """By name the parts that make up a tensor, in some order."""
    draw = random.Random(seed)
    found = {name: cut(draw, [Part.all_of(shape)], 2) for name, shape in SHAPES.items()}
    found["qkv"] = cut(draw, interleaved(SHAPES["qkv"], draw.choice([1, 2, 4])), 1)
    for parts in found.values():
        draw.shuffle(parts)
    return found


def by_rank(parts: dict[str, list[Part]], ranks: int) -> Divided:
    """What each rank has; of several parts that would be one rank's, it has the first."""
    assert all(len(all_of) <= ranks for all_of in parts.values())
    return [
        {name: all_of[rank] for name, all_of in parts.items() if rank < len(all_of)}
        for rank in range(ranks)
    ]


@dataclass
class Spy:
    """A safetensors file that notes how many bytes are read of it, and how often its header is."""

    file: Any
    sizes: list[int] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)

    def metadata(self) -> Any:
        self.headers.append("metadata")
        return self.file.metadata()

    def offset_keys(self) -> Any:
        return self.file.offset_keys()

    def get_tensor(self, name: str) -> Tensor:
        return self._noted(self.file.get_tensor(name))

    def get_slice(self, name: str) -> Any:
        return _SpiedSlice(self.file.get_slice(name), self)

    def _noted(self, tensor: Tensor) -> Tensor:
        self.sizes.append(tensor.nbytes)
        return tensor


@dataclass
class _SpiedSlice:
    slice: Any
    spy: Spy

    def get_shape(self) -> list[int]:
        return self.slice.get_shape()

    def __getitem__(self, index: Any) -> Tensor:
        return self.spy._noted(self.slice[index])


def write(folder: Path, wholes: dict[str, Tensor], divided: Divided) -> StoredTensors:
    """Write what each rank has to a file of its own."""
    files = []
    for rank, parts in enumerate(divided):
        path = folder / f"{len(list(folder.iterdir()))}-{rank}.safetensors"
        tensors = {name: part.take(wholes[name]) for name, part in parts.items()}
        write_tensors(path, Group(tensors, {}, parts))
        files.append(Spy(safe_open(path, framework="pt")))
    return StoredTensors(files)


@pytest.mark.parametrize(("seed", "dtype"), list(enumerate(DTYPES * 2)))
def test_any_part_is_read_from_files_in_any_other_division(
    tmp_path: Path, seed: int, dtype: torch.dtype
) -> None:
    """And nothing else is read: as many bytes as are wanted, of slices that have them."""
    wholes = {name: numbered(shape, dtype) for name, shape in SHAPES.items()}
    written = divisions(seed)
    stored = write(tmp_path, wholes, by_rank(written, max(map(len, written.values()))))
    assert stored.shapes() == SHAPES
    for name, parts in divisions(seed + 100).items():
        for part in [*parts, Part.all_of(SHAPES[name])]:
            for file in stored.files:
                file.sizes.clear()
            found = stored.part(name, part)
            assert found.dtype == dtype and torch.equal(found, part.take(wholes[name]))
            assert sum(sum(file.sizes) for file in stored.files) == found.nbytes
    whole = stored.whole()
    assert whole.keys() == wholes.keys()
    assert all(torch.equal(whole[name], wholes[name]) for name in wholes)
    assert all(len(file.headers) == 1 for file in stored.files)  # they may be many and large


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_part_that_no_file_has_is_named(tmp_path: Path, name: str) -> None:
    wholes = {name: numbered(shape, torch.float32) for name, shape in SHAPES.items()}
    written = divisions(3)
    lost = next(part for part in written[name] if 0 not in part.local_shape)
    written[name] = [part for part in written[name] if part != lost]
    ranks = max(map(len, written.values()))
    stored = write(tmp_path, wholes, by_rank(written, ranks))
    for wanted in (lost, Part.all_of(SHAPES[name])):
        with pytest.raises(KeyError, match=name):
            stored.part(name, wanted)
    kept = [part for part in written[name] if 0 not in part.local_shape]
    for part in kept:
        assert torch.equal(stored.part(name, part), part.take(wholes[name]))
        with pytest.raises(KeyError, match=name):
            stored.whole()
    with pytest.raises(KeyError, match="nothing"):
        stored.part("nothing", lost)


def saved_by_ranks(run: Path, wholes: dict[str, Tensor], divided: Divided) -> Path:
    """Save a checkpoint as several ranks do, here one after the other; return its folder."""
    made = [
        Checkpoints(
            run / "checkpoints",
            keep=2,
            background=False,
            warn=pytest.fail,
            rank=rank,
            ranks=len(divided),
        )
        for rank in range(len(divided))
    ]
    work = made[0].begin(4)
    for rank in reversed(range(len(divided))):  # the first one waits for the others
        parts = {"model": divided[rank]}
        tensors = {name: part.take(wholes[name]) for name, part in divided[rank].items()}
        state = {"rank": rank}
        made[rank].save(4, {"model": tensors}, state, {}, parts=parts, work=work)
    return run / "checkpoints" / "step-00000004"


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_write_the_digest_that_one_process_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    wholes = {name: numbered(shape, dtype) for name, shape in SHAPES.items()}
    rows = {name: cut_rows(shape, 4) for name, shape in SHAPES.items()}
    path = saved_by_ranks(tmp_path / "four", wholes, by_rank(rows, 4))
    assert len(list(path.glob("model-*-of-00004.safetensors"))) == 4
    assert {"manifest.json", "state.json"} == {
        p.name for p in path.iterdir() if "-of-" not in p.name
    }
    alone = checkpoints_in(tmp_path / "one")
    alone.save(4, {"model": wholes}, {"rank": 0}, {})
    four, one = open_checkpoint(path), open_checkpoint(tmp_path / "one")
    assert four.manifest["tensors"]["model"]["digest"] == one.manifest["tensors"]["model"]["digest"]
    assert four.state == one.state and four.shapes("model") == one.shapes("model") == SHAPES
    both = four.tensors("model"), one.tensors("model")
    assert all(torch.equal(both[0][name], both[1][name]) for name in SHAPES)
    # One element of one rank's, and the digest is another.
    wholes["embed"].view(-1)[-1] += 1
    other = open_checkpoint(saved_by_ranks(tmp_path / "other", wholes, by_rank(rows, 4)))
    digests = [found.manifest["tensors"]["model"]["digest"] for found in (four, other)]
    assert digests[0] != digests[1]


def cut_rows(shape: tuple[int, ...], ranks: int) -> list[Part]:
    """The shares of ranks by rows; the first has what has no rows."""
    whole = Part.all_of(shape)
    if not shape:
        return [whole]
    return [whole.narrow(0, *share_of(shape[0], ranks, rank)) for rank in range(ranks)]


def test_a_checkpoint_that_lacks_a_part_says_which_tensor(tmp_path: Path) -> None:
    wholes = {"embed": numbered((509, 6), torch.float32), "bias": numbered((4,), torch.float32)}
    rows = {name: cut_rows(tuple(whole.shape), 2) for name, whole in wholes.items()}
    divided = by_rank(rows, 2)
    del divided[1]["embed"]
    found = open_checkpoint(saved_by_ranks(tmp_path, wholes, divided))
    for wanted in (rows["embed"][1], Part.all_of((509, 6))):
        with pytest.raises(CheckpointError, match=r"step-00000004 is damaged.*embed is not whole"):
            found.part("model", "embed", wanted)
    assert torch.equal(found.part("model", "embed", rows["embed"][0]), wholes["embed"][:255])
    assert torch.equal(found.part("model", "bias", rows["bias"][1]), wholes["bias"][2:])
    with pytest.raises(CheckpointError, match=r"embed.*is not whole"):
        found.tensors("model")
    with pytest.raises(CheckpointError, match=r"has no tensors 'optimizer'.*has model"):
        found.part("optimizer", "embed", rows["embed"][0])


def test_a_tied_name_is_read_by_its_other(tmp_path: Path) -> None:
    made, weight = checkpoints_in(tmp_path), numbered((509, 6), torch.float32)
    made.save(4, {"model": {"embed": weight, "head": weight}}, {}, {})
    found, wanted = open_checkpoint(tmp_path), Part.all_of((509, 6)).narrow(0, 500, 509)
    assert torch.equal(found.part("model", "head", wanted), weight[500:])
    assert found.shapes("model") == {"embed": (509, 6), "head": (509, 6)}
