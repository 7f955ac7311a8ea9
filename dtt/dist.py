"""Ranks with devices, and the few things that they do together; everything else asks a `Runtime`.

Who a process is among the ranks is found by `dtt.place`.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dtt import network
from dtt.errors import (
    EXIT_INTERNAL,
    ConfigError,
    DttError,
    OtherRankError,
    PeerError,
    RankError,
)
from dtt.machine import cores, keep_freed_memory
from dtt.place import Place as Place
from dtt.place import find_place as find_place
from dtt.place import find_point
from dtt.rendezvous.alarm import Alarm
from dtt.rendezvous.meet import Met, meet
from dtt.rendezvous.room import Card
from dtt.version import __version__

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
FIRST = timedelta(minutes=1)
"""For ranks that have just met to connect, and for their first collective."""
INTERFACE = {"cpu": "GLOO_SOCKET_IFNAME", "mps": "GLOO_SOCKET_IFNAME", "cuda": "NCCL_SOCKET_IFNAME"}
"""Which variable chooses the network interface."""


@dataclass(frozen=True)
class Runtime:
    """A rank with its device; collectives are no-ops when it is alone."""

    place: Place
    device: torch.device
    alarm: Alarm | None = None
    """Where there are other ranks."""

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

    def first(self, value: str | None) -> str | None:
        """Return, on every rank, the value of the first rank that has one."""
        if self.ranks == 1:
            return value
        found: list[str | None] = [None] * self.ranks
        dist.all_gather_object(found, value)
        return next((each for each in found if each is not None), None)

    @contextmanager
    def sharing_failures(self) -> Iterator[None]:
        """Tell the other ranks of an error that leaves the block, and name the rank that is lost.

        All leave it together: where one rank ends with a code, as after a preemption, mpirun and
        torchrun kill the others, which must not be before the main rank has saved.
        LostRankError replaces what a collective raises that another rank did not come to.
        """
        try:
            yield
            if self.ranks > 1:
                dist.barrier()
        except Exception as error:
            if self.alarm is None:
                raise
            if _is_loss(error):
                raise self.alarm.lost() from error
            self.alarm.ring(error)
            raise
        except (KeyboardInterrupt, SystemExit):  # a signal to this rank alone, perhaps
            if self.alarm is not None:
                self.alarm.ring(PeerError("it was stopped by a signal"))
            raise
        finally:
            if self.alarm is not None:
                self.alarm.close()

    def close(self) -> None:
        """Leave the process group; call before the process ends well."""
        if self.alarm is not None:
            self.alarm.close()
        if self.ranks > 1 and dist.is_initialized():
            dist.destroy_process_group()


def start(
    place: Place,
    device: str,
    threads: int | None,
    facts: Mapping[str, str] | None = None,
    seconds: float = 300.0,
) -> Runtime:
    """Choose the device and threads of this rank and meet the others, for at most `seconds`.

    MASTER_ADDR and MASTER_PORT say where, else the launcher (`dtt.place`). PeerError if some stay
    away; RankError if they do not fit together, as when `facts` differ.
    """
    chosen = choose_device(device, place.local_rank)
    if chosen.type == "cpu":
        keep_freed_memory()
        torch.set_num_threads(threads or max(1, cores() // place.local_ranks))
    elif chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if place.ranks == 1:
        return Runtime(place, chosen)
    card = Card(
        place.rank,
        place.ranks,
        facts={
            "version of dtt": __version__,
            "version of PyTorch": torch.__version__,
            **(facts or {}),
        },
        device=str(torch.cuda.get_device_properties(chosen).uuid) if chosen.type == "cuda" else "",
        address=_interface_address(INTERFACE[chosen.type]),
    )
    point = find_point(place, os.environ)
    met = meet(place, point, card, seconds)
    _join(met, place, chosen)
    return Runtime(place, chosen, Alarm(met.room, met.cards, point.served))


def _is_loss(error: Exception) -> bool:
    """Whether a collective failed because another rank has gone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _interface_address(variable: str) -> str:
    """The address of the interface that the user has chosen; empty where the choice is ours."""
    value = os.environ.get(variable, "")
    if not value:
        return ""
    known = network.interfaces()
    meant = network.named_interfaces(variable, value)
    if known and not meant:
        what = f"{variable}={value} is no interface of {socket.gethostname()}"
        raise RankError(what, f"it has {network.shown_interfaces()}")
    address = next((known[name][0] for name in meant if known[name]), "")
    if known and not address:
        what = f"{variable}={value}: {meant[0]} of {socket.gethostname()} has no address"
        raise RankError(what, f"choose another of {network.shown_interfaces()}")
    return address


def _join(met: Met, place: Place, device: torch.device) -> None:
    """Make the process group of ranks that have met, and prove that it works."""
    variable = INTERFACE[device.type]
    if device.type != "cuda" and not os.environ.get(variable):
        # Gloo's own choice is what the host's name resolves to: for many that is 127.0.1.1.
        loopback = network.LOOPBACK.get(sys.platform, "")
        name = loopback if met.is_one_host else network.interface_of(met.cards[place.rank].address)
        if name:
            os.environ[variable] = name
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=met.room.store,
            rank=place.rank,
            world_size=place.ranks,
            timeout=FIRST,
        )
        dist.all_reduce(torch.zeros(1, device=device), async_op=True).wait(FIRST)
    except (RuntimeError, ValueError) as error:
        # The reason of another rank, if it has left one, is the first.
        met.room.heed()
        reason = str(error).splitlines()[0]
        met.room.fail(
            PeerError(
                f"{met.cards[place.rank]} met all others, but then could not work with them: "
                f"{reason}",
                f"see their messages; on a host with several networks name one in {variable} "
                f"(here it is {os.environ.get(variable, 'not set')})",
            )
        )
    dist.distributed_c10d._set_pg_timeout(TIMEOUT)


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
