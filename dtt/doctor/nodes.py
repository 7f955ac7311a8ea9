"""Several machines: each examines itself, then all of them together, and the main rank reports.

Ranks meet before anything is measured, so that a machine that does not come is named at once. The
first rank of each machine examines it; the others wait.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dtt import dist as ranks
from dtt.doctor import link, network
from dtt.doctor.comparison import (
    compare,
    judge_all_reduce,
    judge_clocks,
    judge_folder,
    judge_loss,
    shared,
)
from dtt.doctor.disk import existing
from dtt.doctor.examination import examine
from dtt.doctor.finding import PEERS, STORAGE, Finding, Subject, failed
from dtt.doctor.report import Node
from dtt.doctor.roll import Roll
from dtt.errors import DttError, OtherRankError

MEETING = 60.0
"""Seconds that ranks have to meet, unless the configuration says how many."""
SEEN_WITHIN = 5.0
"""Seconds after which a file must be visible on all machines (NFS keeps folders for 3 to 60)."""


def examine_nodes(subject: Subject) -> tuple[list[Node], list[Finding]]:
    """Examine all machines of a launch; return the nodes, and what concerns all of them.

    Where they do not meet, or one is lost, that is a finding of the main rank, beside those of its
    own machine: what keeps them apart may be there. On the other ranks it is a PeerError.
    """
    place = subject.place
    try:
        given = "rendezvous_timeout" in subject.config.parallel.model_fields_set
        seconds = subject.config.parallel.rendezvous_timeout if given else MEETING
        runtime = ranks.start(place, "cpu", None, seconds=seconds)
    except DttError as error:
        if place.rank:
            raise
        name = os.uname().nodename
        here = Node(name, place.local_ranks, examine(subject))
        apart = failed(error.what, error.fix or "start all of them, with one MASTER_ADDR")
        return [here], [shared(replace(apart, code=error.exit_code), "meeting")]
    hosts = hosts_of(runtime)
    with Roll(runtime) as roll:
        roll.hand_in(examine(subject) if place.local_rank == 0 else [])
        found, lost = roll.collect() if runtime.is_main else ([], roll.learn())
        if lost and not runtime.is_main:
            raise OtherRankError(PEERS)
    if lost:
        return named_nodes(hosts, found), [judge_loss(lost, hosts)]
    together = [*_together(subject, runtime, hosts)]
    shared_found: list[Any] = [found]
    dist.broadcast_object_list(shared_found)
    nodes = named_nodes(hosts, shared_found[0])
    runtime.close()
    return nodes, [*compare(nodes), *together]


def hosts_of(runtime: ranks.Runtime) -> list[str]:
    """Return the host of each rank."""
    hosts: list[Any] = [None] * runtime.ranks
    dist.all_gather_object(hosts, os.uname().nodename)
    return hosts


def named_nodes(hosts: Sequence[str], gathered: Sequence[list[Finding]]) -> list[Node]:
    """Return the nodes of what each rank has found; those that found nothing are counted with
    their host. Names are made unique."""
    leads = [rank for rank, found in enumerate(gathered) if found]
    names = [hosts[rank] for rank in leads]
    nodes = []
    for number, rank in enumerate(leads):
        host = hosts[rank]
        same = names.count(host)
        name = f"{host}#{names[: number + 1].count(host)}" if same > 1 else host
        nodes.append(Node(name, hosts.count(host) // same, gathered[rank]))
    return nodes


def _together(subject: Subject, runtime: ranks.Runtime, hosts: Sequence[str]) -> Iterator[Finding]:
    """What all ranks do together; the same calls on each, whatever they find."""
    clocks: list[Any] = [None] * runtime.ranks
    dist.barrier()
    dist.all_gather_object(clocks, time.time())
    yield shared(judge_clocks(list(zip(hosts, clocks, strict=True))), "clocks", PEERS)
    yield shared(judge_folder(_see_each_other(subject, runtime)), "run folder", STORAGE)
    # By now this names what gloo uses: what the user chose, or where the ranks met.
    speed = network.speed_of(os.environ.get("GLOO_SOCKET_IFNAME", ""))
    speeds: list[Any] = [None] * runtime.ranks
    dist.all_gather_object(speeds, speed)
    several = len(set(hosts)) > 1
    known = min(speeds) if several and all(speeds) else 0.0
    if not subject.quick:
        rate = link.bus_bandwidth(torch.device("cpu"), runtime.ranks, link.SIZE // 4)
        finding = judge_all_reduce("gloo", rate, runtime.ranks, known)
        yield shared(finding, "all-reduce gloo", PEERS)
        rate = _nccl(subject, runtime)
        if rate:
            finding = judge_all_reduce("nccl", rate, runtime.ranks, known)
            yield shared(finding, "all-reduce nccl", PEERS)


def _see_each_other(subject: Subject, runtime: ranks.Runtime) -> list[tuple[str, bool, bool]]:
    """(host, sees the file, is kept out by its lock) of each rank, for a file of the main rank."""
    folder, name = existing(subject.config.dir), f".dtt-doctor-{secrets.token_hex(4)}"
    said: list[Any] = [str(folder), name]
    dist.broadcast_object_list(said)
    path = Path(*said)
    with _locked(path) if runtime.is_main else nullcontext():
        dist.barrier()
        sees, kept_out = runtime.is_main, True
        deadline = time.monotonic() + SEEN_WITHIN
        while not sees and time.monotonic() < deadline:
            with suppress(OSError):
                os.listdir(path.parent)  # which makes NFS look again
            sees = path.exists()
            time.sleep(0.0 if sees else 0.2)
        if sees and not runtime.is_main:
            kept_out = _is_kept_out(path)
        found: list[Any] = [None] * runtime.ranks
        dist.all_gather_object(found, (os.uname().nodename, sees, kept_out))
    return found


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A file that is there and locked; nothing where it cannot be made."""
    try:
        with path.open("w", encoding="ascii") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except OSError:
        yield
    finally:
        path.unlink(missing_ok=True)


def _is_kept_out(path: Path) -> bool:
    try:
        with path.open("r", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _nccl(subject: Subject, runtime: ranks.Runtime) -> float:
    """The bus bandwidth over a GPU for each rank; 0 where not all ranks have one of their own."""
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= runtime.place.local_ranks
    all_have: list[Any] = [None] * runtime.ranks
    dist.all_gather_object(all_have, enough)
    if not all(all_have):
        return 0.0
    device = torch.device("cuda", runtime.place.local_rank)
    torch.cuda.set_device(device)
    group = dist.new_group(backend="nccl")
    return link.bus_bandwidth(device, runtime.ranks, link.SIZE * 4, group)
