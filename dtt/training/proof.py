"""Proving a checkpoint while it is loaded: ranks share the hashing, and nothing is used before.

Reading a checkpoint from a disk leaves the cores idle, and copying it into a model leaves the disk
idle, so that both together take little longer than reading it once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from dtt.dist import Runtime
from dtt.errors import CheckpointError, DttError
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
        with Proof(saved, runtime) as proof:
            try:
                built = build(proof)
            except CheckpointError as error:
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
        # More threads than cores, since they wait for the disk, too.
        self._pool = ThreadPoolExecutor(min(len(names), 2 * cores()) or 1)
        self._hashes = [self._pool.submit(saved.prove, name) for name in names]

    def __enter__(self) -> Proof:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def group(self, name: str) -> UnprovenGroup:
        """Return the tensors of one group, which may turn out to be damaged."""
        return UnprovenGroup(self.saved, name, self._problems)

    def end(self, problem: CheckpointError | None) -> str | None:
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


@dataclass(frozen=True)
class UnprovenGroup:
    """The tensors of one group of a checkpoint that is being proven.

    Reading never fails, so that no rank leaves the others while they build the model: what it meets
    is kept in `problems`. What the files say of their tensors may be damaged, too, and so anything
    can go wrong.
    """

    saved: Saved
    group: str
    problems: list[Exception]

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
            found = self.saved.part(self.group, name, part)
            if tuple(found.shape) == tuple(part.local_shape):
                return found
            raise CheckpointError(f"checkpoint {self.saved.path} has another shape of {name}")
        except Exception as problem:
            self.problems.append(problem)
            return torch.zeros(part.local_shape)
