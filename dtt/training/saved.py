"""Reading checkpoints: choose one in a run, and prove it whole before use.

RUN/checkpoints/step-00000400/ holds one safetensors file per tensor group (one per rank, where
ranks divide the model), state.json, further files (config.yaml, the tokenizer) and manifest.json,
which has size and BLAKE3 hash of each.
Nothing here can execute code: safetensors and JSON only. The files `last` and `best` beside the
folders are for people; the folders themselves are the truth, so a wrong pointer cannot mislead.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dtt import storage
from dtt.errors import CheckpointError, DttError, StorageError
from dtt.machine import cores
from dtt.parallel.part import Part
from dtt.runs import MANIFEST, STEP, find_run, is_checkpoint, scan
from dtt.storage import file_digest, storage_errors
from dtt.training.snapshot import digest
from dtt.training.stored import StoredTensors
from dtt.version import __version__

FORMAT = 3
"""Version of the folder's layout; a reader refuses every other."""
STATE = "state.json"
LARGEST_JSON = 64 << 20
BEGINNING = 256 << 10
"""Bytes of a file of tensors in which its header is, mostly."""
FALLING_BACK = "falling back to the checkpoint before it"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was whole when it was opened, and stays readable if it is deleted."""

    path: Path
    step: int
    state: dict[str, Any]
    """The contents of state.json."""
    files: dict[str, bytes]
    """The further files by name, as given to `Checkpoints.save`."""
    manifest: dict[str, Any]
    _open: dict[str, StoredTensors]

    def tensors(self, group: str, device: str = "cpu") -> dict[str, Tensor]:
        """Return one group's tensors by name, whole; tied names share one tensor.

        Of a file that one rank wrote, they are on the CPU views of one private mapping: changing
        them leaves the file alone, but a later call for the same group sees the change, and refuses
        it. Raises CheckpointError if there is no such group, or its values are not those saved.
        """
        entry = self._entry(group)
        try:
            tensors = self._open[group].whole()
        except KeyError as error:
            raise _damaged(self.path, entry["files"][0], f"{error} is not whole") from None
        tensors |= {alias: tensors[name] for alias, name in entry["tied"].items()}
        if digest(tensors) != entry["digest"]:
            what = "its values are not those that were saved"
            raise _damaged(self.path, entry["files"][0], what)
        if device == "cpu":
            return tensors
        moved = {id(tensor): tensor.to(device) for tensor in tensors.values()}
        return {name: moved[id(tensor)] for name, tensor in tensors.items()}

    @property
    def tensor_files(self) -> list[str]:
        """The names of the files of tensors that are open."""
        entries = self.manifest["tensors"]
        return [name for group in self._open for name in entries[group]["files"]]

    def prove(self, name: str, passed: Callable[[int], None] | None = None) -> None:
        """Hash a file of tensors; CheckpointError if it is not the one that was saved.

        `passed` is told now and then how many of its bytes are hashed.
        """
        with _damage(self.path, name):
            found = file_digest(_member(self.path, name), blake3, passed)
        _compare(self.path, name, self.manifest["files"][name], found)

    def shapes(self, group: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one group's whole tensors, without reading them."""
        found = self._open[group].shapes()
        return found | {alias: found[name] for alias, name in self._entry(group)["tied"].items()}

    def part(self, group: str, name: str, part: Part) -> Tensor:
        """Read a part of a tensor, and no other."""
        entry = self._entry(group)
        try:
            return self._open[group].part(entry["tied"].get(name, name), part)
        except KeyError:
            raise _damaged(self.path, entry["files"][0], f"{name} is not whole") from None

    def _entry(self, group: str) -> dict[str, Any]:
        if group not in self._open:
            has = ", ".join(sorted(self._open))
            raise CheckpointError(f"checkpoint {self.path} has no tensors {group!r}", f"has {has}")
        entry: dict[str, Any] = self.manifest["tensors"][group]
        return entry


def seal(manifest: dict[str, Any]) -> bytes:
    """Return the one valid text of a manifest: all of it, then the SHA-256 of that as its seal."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    whole = hashlib.sha256(json.dumps(rest, allow_nan=False).encode()).hexdigest()
    return (json.dumps({**rest, "seal": whole}, indent=2) + "\n").encode()


def read(path: Path, groups: Collection[str] | None = None, *, hashed: bool = True) -> Saved:
    """Open the checkpoint folder `path`; every byte in it has been hashed when this returns.

    With `groups` only these tensors are opened and hashed, beside the small files; without `hashed`
    tensors are not, and the caller does it (`dtt.training.proof`). Raises CheckpointError if
    anything is missing, damaged, foreign or of another format version.
    """
    manifest = read_manifest(path)
    try:
        contents, opened = _contents(path, manifest, groups)
        state = json.loads(contents.pop(STATE))
        saved = Saved(path, manifest["step"], state, contents, manifest, opened)
        names = saved.tensor_files
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise _damaged(path, MANIFEST, "does not describe a checkpoint") from error
    if hashed:
        # More threads than cores, since they wait for the disk, too.
        with ThreadPoolExecutor(min(len(names), 2 * cores()) or 1) as pool:
            for _ in pool.map(saved.prove, names):
                pass
    return saved


def _contents(
    path: Path, manifest: dict[str, Any], wanted: Collection[str] | None
) -> tuple[dict[str, bytes], dict[str, StoredTensors]]:
    """Return the small files' bytes by name, verified, and the open tensor files by group."""
    contents: dict[str, bytes] = {}
    opened: dict[str, list[Any]] = {}
    entries = manifest["tensors"].items()
    groups = {name: group for group, entry in entries for name in entry["files"]}
    unwanted = {
        name for name, group in groups.items() if wanted is not None and group not in wanted
    }
    files = {name: _member(path, name) for name in manifest["files"] if name not in unwanted}
    for file in files.values():
        with _damage(path, file.name):
            storage.expect(file, BEGINNING)  # else the header of each is waited for in turn
    for name, file in files.items():
        entry = manifest["files"][name]
        with _damage(path, name):
            size = file.stat().st_size
            if size != entry["size"]:
                raise _damaged(path, name, f"{size} bytes instead of {entry['size']}")
            if name in groups:  # opened before it is hashed, so that it cannot be swapped
                opened.setdefault(groups[name], []).append(safe_open(file, framework="pt"))
                continue
            contents[name] = file.read_bytes()
        _compare(path, name, entry, blake3(contents[name]).hexdigest())
    return contents, {group: StoredTensors(files) for group, files in opened.items()}


@contextmanager
def _damage(path: Path, name: str) -> Iterator[None]:
    """Say of what goes wrong inside that this file is damaged."""
    try:
        yield
    # safe_open raises RuntimeError, too, for a file that is removed while it maps it.
    except (OSError, RuntimeError, SafetensorError, StorageError) as error:
        raise _damaged(path, name, str(error)) from error


def _compare(path: Path, name: str, entry: dict[str, Any], found: str) -> None:
    if found != entry["blake3"]:
        raise _damaged(path, name, "its hash is not the manifest's")


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a checkpoint folder's manifest, itself intact and of this folder."""
    file = _member(path, MANIFEST)
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise ValueError("too large")
        data = file.read_bytes()
        manifest: dict[str, Any] = json.loads(data)
        version = manifest["format"]
        intact = seal(manifest) == data
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, MANIFEST, "not a manifest") from error
    if version != FORMAT:
        writer = manifest.get("dtt", "unknown")
        raise CheckpointError(
            f"checkpoint {path} has format version {version!r}, written by dtt {writer}; "
            f"this is dtt {__version__}, which reads version {FORMAT}",
            f"use dtt {writer} for it",
        )
    if not intact:
        raise _damaged(path, MANIFEST, "its seal is not that of its text")
    match = STEP.fullmatch(path.name)
    if match and int(match[1]) != manifest["step"]:
        raise _damaged(path, MANIFEST, f"belongs to step {manifest['step']}")
    return manifest


def newest(
    folder: Path,
    warn: Callable[[str], None],
    damaged: Mapping[str, str],
    *,
    hashed: bool = True,
) -> Saved | None:
    """Return the newest whole checkpoint in `folder`, with a warning for each newer damaged one.

    Those of which the names are in `damaged`, and why, are known to be so. None if there is no
    checkpoint. Raises CheckpointError if there are some and none is whole: starting over is the
    user's decision.
    """
    problem: str | None = None
    for path in scan(folder):
        if path.name in damaged:
            problem = damaged[path.name]
            continue
        try:
            return read(path, hashed=hashed)
        except DttError as error:
            problem = error.what
            warn(f"{error.what}; {FALLING_BACK}")
    if problem is None:
        return None
    raise CheckpointError(
        f"no checkpoint in {folder} is whole ({problem})", "restore one, or use --fresh"
    )


def open_checkpoint(
    path: Path,
    which: str = "best",
    groups: Collection[str] | None = None,
    *,
    hashed: bool = True,
) -> Saved:
    """Open one checkpoint by name: `path` is a run (then `which` chooses) or a checkpoint folder.

    `which` is "last", a step, or "best": the lowest validation loss, or the last where none was
    measured; a path that ends in checkpoints/last or checkpoints/best chooses too. Nothing is
    substituted: what was asked for (of `groups`, if given) is whole, or it is a CheckpointError;
    `hashed` as in `read`.
    """
    if path.name in ("last", "best") and path.parent.name == "checkpoints":
        path, which = path.parent.parent, path.name  # the pointer files that people see
    if is_checkpoint(path):
        return read(path, groups, hashed=hashed)
    folder = find_run(path) / "checkpoints"
    for _ in range(20):  # a run that is writing may remove or replace what was just chosen
        before = _listing(folder)
        try:
            return read(_choose(folder, which), groups, hashed=hashed)
        except CheckpointError:
            if _listing(folder) == before:
                raise
    raise CheckpointError(f"the checkpoints in {folder} change too fast to be read", "try again")


def _listing(folder: Path) -> list[tuple[str, int]]:
    if not folder.is_dir():
        return []
    with storage_errors(folder, "read"), os.scandir(folder) as entries:
        # Not by name alone: a checkpoint may be replaced by another of the same step.
        return sorted((entry.name, entry.inode()) for entry in entries)


def _choose(folder: Path, which: str) -> Path:
    found = scan(folder)
    if not found:
        raise CheckpointError(f"{folder.parent} has no checkpoint yet", "train it first")
    if which == "last":
        return found[0]
    if which == "best":
        losses = {path: best_loss(path) for path in found}
        measured = {path: loss for path, loss in losses.items() if loss is not None}
        return min(measured, key=lambda path: measured[path]) if measured else found[0]
    steps = {path.name.removesuffix(".old")[5:].lstrip("0") or "0": path for path in found[::-1]}
    wanted = which.removeprefix("step-").lstrip("0") or "0"
    if wanted not in steps:
        has = ", ".join(steps)
        raise CheckpointError(
            f"{folder} has no checkpoint {which!r}", f"best, last or one of {has}"
        )
    return steps[wanted]


def best_loss(path: Path) -> float | None:
    """Return the validation loss of a checkpoint saved as the best so far, None for any other."""
    loss = read_manifest(path)["best_loss"]
    return None if loss is None else float(loss)


def _member(folder: Path, name: str) -> Path:
    """Return the regular file `name` inside `folder`, links and ways out refused."""
    file = folder / name
    try:
        if file.resolve() != folder.resolve() / name:
            raise _damaged(folder, name, "leads out of the checkpoint")
        if not stat.S_ISREG(file.lstat().st_mode):
            raise _damaged(folder, name, "not a regular file")
    except (OSError, RuntimeError, ValueError) as error:
        raise _damaged(folder, name, "missing") from error
    return file


def _damaged(folder: Path, name: str, how: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {folder} is damaged: {name}: {how}",
        "choose another checkpoint of the run (--checkpoint last, best or a step)",
    )
