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
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dtt import dist as ranks
from dtt.doctor import link, network
from dtt.doctor.bench import short
from dtt.doctor.comparison import (
    LOST,
    compare,
    judge_all_reduce,
    judge_clocks,
    judge_folder,
    judge_loss,
    judge_nccl_failure,
    shared,
)
from dtt.doctor.disk import existing
from dtt.doctor.examination import examine
from dtt.doctor.finding import PEERS, STORAGE, Finding, Subject, failed
from dtt.doctor.report import Node
from dtt.doctor.roll import Roll
from dtt.errors import DttError, LostRankError, OtherRankError
from dtt.machine import bounded

MEETING = 60.0
"""Seconds that ranks have to meet, unless the configuration says how many."""
NCCL = 90.0
"""Seconds for GPUs of several machines to connect and to sum."""
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
        return [here], [_apart(error, error.fix or "start all of them, with one MASTER_ADDR")]
    hosts = hosts_of(runtime)
    with Roll(runtime) as roll:
        roll.hand_in(examine(subject) if place.local_rank == 0 else [])
        found, lost = roll.collect() if runtime.is_main else ([], roll.learn())
        if lost and not runtime.is_main:
            raise OtherRankError(PEERS)
    if lost:
        return named_nodes(hosts, found), [judge_loss(lost, hosts)]
    try:
        with runtime.sharing_failures():
            together = [*_together(subject, runtime, hosts)]
            shared_found: list[Any] = [found]
            dist.broadcast_object_list(shared_found)
    except Exception as error:
        lost = roll.call()
        if not (runtime.is_main and isinstance(error, LostRankError)):
            raise
        finding = judge_loss(lost, hosts) if lost else _apart(error, LOST)
        return named_nodes(hosts, found), [finding]
    # The groups stay: where NCCL hangs, to end one would hang too, and the process ends now.
    nodes = named_nodes(hosts, shared_found[0])
    return nodes, [*compare(nodes), *together]


def _apart(error: DttError, mend: str) -> Finding:
    """What keeps the ranks from working together, as a finding."""
    return shared(replace(failed(error.what, mend), code=error.exit_code), "meeting")


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
        yield from _over_gpus(runtime, hosts, known)


def _see_each_other(subject: Subject, runtime: ranks.Runtime) -> list[tuple[str, bool, bool]]:
    """(host, sees the file, is kept out by its lock) of each rank, for a file of the main rank."""
    folder, name = existing(subject.config.dir), f".dtt-doctor-{secrets.token_hex(4)}"
    said: list[Any] = [str(folder), name]
    dist.broadcast_object_list(said)
    path = Path(*said)
    with locked(path) if runtime.is_main else nullcontext(True) as kept_out:
        dist.barrier()
        sees = runtime.is_main
        deadline = time.monotonic() + SEEN_WITHIN
        while not sees and time.monotonic() < deadline:
            with suppress(OSError):
                os.listdir(path.parent)  # which makes NFS look again
            sees = path.exists()
            time.sleep(0.0 if sees else 0.2)
        if sees and not runtime.is_main:
            kept_out = is_kept_out(path)
        found: list[Any] = [None] * runtime.ranks
        dist.all_gather_object(found, (os.uname().nodename, sees, kept_out))
    return found


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """A file that is there and locked; False where there can be none, or no locks."""
    with ExitStack() as stack:
        holds = False
        with suppress(OSError):
            file = stack.enter_context(path.open("w", encoding="ascii"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            holds = True
        try:
            yield holds
        finally:
            with suppress(OSError):
                path.unlink()


def is_kept_out(path: Path) -> bool:
    """Return whether somebody else's lock of a file keeps this process out."""
    try:
        with path.open("r", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there are no locks here
        return False
    return False


def _over_gpus(runtime: ranks.Runtime, hosts: Sequence[str], link_gb_s: float) -> Iterator[Finding]:
    """Judge an all-reduce by NCCL, if each rank has a GPU of its own."""
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= runtime.place.local_ranks
    all_have: list[Any] = [None] * runtime.ranks
    dist.all_gather_object(all_have, enough)
    if not all(all_have):
        return
    rate, reason = 0.0, ""
    try:
        rate = bounded(lambda: _nccl(runtime), NCCL)
    except Exception as error:  # whatever it is, the others are told
        reason = f"{type(error).__name__}: {short(str(error))}"
    reasons: list[Any] = [None] * runtime.ranks
    dist.all_gather_object(reasons, reason)
    finding = judge_nccl_failure(reasons, hosts) or judge_all_reduce(
        "nccl", rate, runtime.ranks, link_gb_s
    )
    yield shared(finding, "all-reduce nccl", PEERS)


def _nccl(runtime: ranks.Runtime) -> float:
    """The bus bandwidth over a GPU for each rank; in a thread, which has a device of its own."""
    device = torch.device("cuda", runtime.place.local_rank)
    torch.cuda.set_device(device)
    # Else NCCL's guard, when another machine's part fails, ends this process and its report.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    group = dist.new_group(backend="nccl")
    return link.bus_bandwidth(device, runtime.ranks, link.SIZE * 4, group)
