"""Proving a checkpoint while it is loaded: ranks share the hashing, and nothing is used before.

Reading a checkpoint from a disk leaves the cores idle, and copying it into a model leaves the disk
idle, so that both together take little longer than reading it once.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor

from dtt.dist import Runtime
from dtt.errors import CheckpointError, ConfigError, DttError
from dtt.machine import cores
from dtt.parallel.part import Part
from dtt.training.saved import Saved

T = TypeVar("T")


def build_whole(
    choose: Callable[[], Saved | None],
    build: Callable[[Proof | None], T],
    judge: Callable[[Saved, str | None], None],
    runtime: Runtime,
) -> T:
    """Return what `build` makes of the newest whole checkpoint, or of None where there is none.

    `choose` opens one, whose tensors are proved while `build` loads them; `judge` is told on the
    main rank what is damaged (None: nothing), after which `choose` is to give another. All ranks
    must call this.
    """
    while True:
        saved = choose()
        if saved is None:
            return build(None)
        built, problem = None, None
        with closing(Proof(saved, runtime)) as proof:
            try:
                built = build(proof)
            except (CheckpointError, ConfigError) as error:  # or what damaged weights look like
                problem = error
            damaged = proof.end(problem)
        runtime.on_main(partial(judge, saved, damaged))
        if damaged is None:
            assert built is not None
            return built


class Proof:
    """Hashes a checkpoint's tensors in the background, this rank its share of their files."""

    def __init__(self, saved: Saved, runtime: Runtime) -> None:
        self.saved, self._runtime = saved, runtime
        self._problems: list[Exception] = []
        names = saved.tensor_files[runtime.rank :: runtime.ranks]
        self._passes = {name: _Pass(saved.manifest["files"][name]["size"]) for name in names}
        # More threads than cores, since they wait for the disk, too.
        self._pool = ThreadPoolExecutor(min(len(names), 2 * cores()) or 1)
        self._hashes = [self._pool.submit(self._prove, name) for name in names]

    def close(self) -> None:
        """Hash no further file; nothing is waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def group(self, name: str) -> UnprovenGroup:
        """Return the tensors of one group, which may turn out to be damaged."""
        files = self.saved.manifest["tensors"].get(name, {"files": ()})["files"]
        passes = [self._passes[file] for file in files if file in self._passes]
        return UnprovenGroup(self.saved, name, self._problems, passes)

    def end(self, problem: DttError | None) -> str | None:
        """Wait until all ranks have proved their share; return what is damaged, None if nothing is.

        All ranks must call it. What loading met on this rank, `problem`, is raised if the files are
        those that were saved.
        """
        errors = [error for each in self._hashes if (error := each.exception()) is not None]
        said = [error.what if isinstance(error, DttError) else str(error) for error in errors]
        damaged = self._runtime.first(said[0] if said else None)
        problems = [*self._problems, *([problem] if problem is not None else [])]
        if damaged is None and problems:
            raise problems[0]
        return damaged

    def _prove(self, name: str) -> None:
        try:
            self.saved.prove(name, self._passes[name].reach)
        finally:
            self._passes[name].reach(None)


class _Pass:
    """How far the hashing of a file is; what it has passed is in memory."""

    def __init__(self, size: int) -> None:
        self._size, self._share = max(size, 1), 0.0
        self._changed = threading.Condition()

    def reach(self, count: int | None) -> None:
        """Take note that so many bytes are hashed; None: it is over, well or not."""
        with self._changed:
            self._share = 1.0 if count is None else count / self._size
            self._changed.notify_all()

    def wait_for(self, share: float) -> None:
        """Wait until so much of the file is hashed."""
        with self._changed:
            self._changed.wait_for(lambda: self._share >= share)


@dataclass(frozen=True)
class UnprovenGroup:
    """The tensors of one group of a checkpoint that is being proven.

    Reading never fails, so that no rank leaves the others while they build the model: what it meets
    is kept in `problems`. What the files say of their tensors may be damaged, too, and so anything
    can go wrong. A tensor is read once the hashing of this rank's files, which have all tensors in
    the same order, has passed its place: from the disk it would come page by page.
    """

    saved: Saved
    group: str
    problems: list[Exception]
    passes: list[_Pass]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the whole tensors by name; CheckpointError, on all ranks, if unknown."""
        try:
            return self.saved.shapes(self.group)
        except Exception as problem:
            what = f"checkpoint {self.saved.path} cannot be read: {problem}"
            raise CheckpointError(what) from problem

    def read(self, name: str, part: Part) -> Tensor:
        """Return a part of a tensor, or zeros if it cannot be read."""
        try:
            for each in self.passes:
                each.wait_for(self._ends.get(name, 0.0))
            found = self.saved.part(self.group, name, part)
            if tuple(found.shape) == tuple(part.local_shape):
                return found
            raise CheckpointError(f"checkpoint {self.saved.path} has another shape of {name}")
        except Exception as problem:
            self.problems.append(problem)
            return torch.zeros(part.local_shape)

    @cached_property
    def _ends(self) -> dict[str, float]:
        """Where each tensor ends, as a share of the group."""
        sizes = {name: math.prod(shape) for name, shape in self.shapes().items()}
        total = max(sum(sizes.values()), 1)
        ends = itertools.accumulate(sizes.values())
        return {name: end / total for name, end in zip(sizes, ends, strict=True)}
