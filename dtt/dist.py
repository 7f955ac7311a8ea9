"""Ranks with devices, and the few things that they do together; everything else asks a `Runtime`.

Who a process is among the ranks is found by `dtt.place`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dtt.errors import EXIT_INTERNAL, ConfigError, DttError, OtherRankError, PeerError
from dtt.machine import cores, keep_freed_memory
from dtt.place import Place as Place
from dtt.place import find_place as find_place

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Runtime:
    """A rank with its device; collectives are no-ops when it is alone."""

    place: Place
    device: torch.device

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def ranks(self) -> int:
        return self.place.ranks

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks to the user."""
        return self.place.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add up `values` over all ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on the main rank and return its result on every rank.

        If it fails there, its error is raised there and `OtherRankError` on the others.
        """
        if self.ranks == 1:
            return action()
        outcome: list[Any] = [None, 0]
        if self.is_main:
            try:
                outcome[0] = action()
            except Exception as error:  # whatever it is, the others wait for an answer
                outcome[1] = error.exit_code if isinstance(error, DttError) else EXIT_INTERNAL
                dist.broadcast_object_list(outcome)
                raise
        dist.broadcast_object_list(outcome)
        if outcome[1]:
            raise OtherRankError(outcome[1])
        result: T = outcome[0]
        return result

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raise ConfigError, on all ranks, if a fact is not the same on every one of them."""
        if self.ranks == 1:
            return
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, dict(facts))
        for name in facts:
            values = [each[name] for each in found]
            other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
            if other is not None:
                raise ConfigError(
                    f"ranks differ in their {name}: {values[0]} on rank 0, {values[other]} on "
                    f"rank {other}",
                    "start all of them from one environment, with the same command",
                )

    def close(self) -> None:
        """Leave the process group; call before the process ends well."""
        if self.ranks > 1 and dist.is_initialized():
            # Where one rank leaves with a code, as after a preemption, mpirun and torchrun kill the
            # others: not before the main rank has saved.
            dist.barrier()
            dist.destroy_process_group()


def start(place: Place, device: str, threads: int | None) -> Runtime:
    """Choose the device and threads of this rank and meet the others; PeerError if they stay away.

    MASTER_ADDR and MASTER_PORT say where, as torchrun, Slurm scripts and MPI scripts set them.
    """
    chosen = choose_device(device, place.local_rank)
    if chosen.type == "cpu":
        keep_freed_memory()
        torch.set_num_threads(threads or max(1, cores() // place.local_ranks))
    elif chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if place.ranks > 1:
        address = os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        port = os.environ.setdefault("MASTER_PORT", "29500")
        try:
            dist.init_process_group(
                "nccl" if chosen.type == "cuda" else "gloo",
                rank=place.rank,
                world_size=place.ranks,
                timeout=TIMEOUT,
            )
        except (RuntimeError, ValueError) as error:
            raise PeerError(
                f"rank {place.rank} of {place.ranks} could not meet the others at "
                f"{address}:{port}: {str(error).splitlines()[0]}",
                "check that all ranks run and that MASTER_ADDR and MASTER_PORT are the same",
            ) from error
    return Runtime(place, chosen)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that ranks divide (a DTensor), or all of another."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device of a rank: `auto` is cuda, else mps, else cpu."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("training.device: cuda, but PyTorch sees no GPU", "use --device auto")
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"{local_rank + 1} ranks on this machine, which has "
                f"{torch.cuda.device_count()} GPUs",
                "start at most one rank per GPU",
            )
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("training.device: mps, but PyTorch sees none", "use --device auto")
    return torch.device(name)


def leave(code: int) -> NoReturn:
    """End a rank without running finalizers.

    A gloo thread that outlives the interpreter aborts the process at exit
    (pytorch/pytorch#190489), so a rank that did its work must not return through them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
