"""Who this process is among the ranks that a launcher started, and where they meet.

The only reader of RANK, MASTER_*, SLURM_*, OMPI_* and PMI_*. It needs neither torch nor an MPI
library: launchers say all of it in the environment.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dtt.errors import ConfigError
from dtt.machine import cores
from dtt.nodelist import expand_counts, expand_nodes

# (rank, world size, local rank, local world size) as each launcher names them.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}
PORT = 29500
"""Where the ranks meet if nobody says another port, as PyTorch has it."""
PORTS = range(15000, 30000)
"""Ports that belong to a launch by its name: below those that Linux gives to connections."""
# What tells one launch from another, where the launcher says it; the same on all of its ranks.
LAUNCH_NAMES = {
    "torchrun": ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"),
    "Open MPI": ("PMIX_NAMESPACE",),
    "MPICH": (),
    "Slurm": ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
}


@dataclass(frozen=True)
class Place:
    """This process among the ranks, as its launcher says."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int = 1
    launcher: str = "none"


@dataclass(frozen=True)
class Point:
    """Where the ranks of a launch meet: at a port of the host of rank 0."""

    address: str
    """Empty: the launcher does not say it, and only `dtt.rendezvous.pmi` can know."""
    port: int
    source: str
    """What said so, for messages."""
    nodes: tuple[str, ...] = ()
    """The node of each rank, where the launcher says it."""
    launch: str = ""
    """A name that all ranks of a launch share and no other launch has, where there is one."""
    served: bool = False
    """Whether the launcher has a store there already (torchrun's agent); else rank 0 makes one."""
    host: str = ""
    """Where the address is empty: what the launcher calls this host, if it says it."""
    descriptor: int = -1
    """Where the address is empty: the socket to ask `dtt.rendezvous.pmi` with."""


@dataclass(frozen=True)
class Array:
    """The task of a Slurm array that this process belongs to, counted from 0."""

    job: str
    task: int
    tasks: int


def find_place(environ: Mapping[str, str]) -> Place:
    """Read rank and world size from the environment of torchrun, MPI or Slurm, else one rank."""
    for launcher, (rank, size, local, local_size) in LAUNCHERS.items():
        if rank not in environ or size not in environ or not _started_by(launcher, environ):
            continue
        try:
            ranks = int(environ[size])
            local_ranks = int(environ.get(local_size, "1").split("(")[0])
            local_rank = int(environ.get(local, 0))
            found = Place(int(environ[rank]), ranks, local_rank, local_ranks, launcher)
        except ValueError:
            raise ConfigError(
                f"{rank}={environ[rank]} and {size}={environ[size]} are not numbers",
                "unset them or start through torchrun",
            ) from None
        if not 0 <= found.rank < ranks:
            raise ConfigError(
                f"{rank}={found.rank} is not a rank of {size}={ranks}",
                f"number the processes from 0 to {size} - 1",
            )
        if launcher == "Slurm" and (counts := _tasks(environ)):
            node = int(environ.get("SLURM_NODEID", 0))
            found = replace(found, local_ranks=counts[node])
        return found
    return Place()


def _started_by(launcher: str, environ: Mapping[str, str]) -> bool:
    """Whether the variables of a launcher are of its own making and for this process."""
    # An interactive Slurm shell has these variables too, but no step of its own.
    in_step = environ.get("SLURM_STEP_ID", "") not in ("", "batch", "interactive")
    if launcher == "Slurm":
        return in_step
    # srun speaks PMI to its tasks as well (--mpi=pmi2), with the same numbers.
    pairs = (("PMI_RANK", "SLURM_PROCID"), ("PMI_SIZE", "SLURM_NTASKS"))
    is_srun = in_step and all(environ.get(ours) == environ.get(its) for ours, its in pairs)
    return launcher != "MPICH" or not is_srun


def _tasks(environ: Mapping[str, str]) -> tuple[int, ...]:
    """How many tasks of this Slurm step are on each of its nodes; () if it does not say so."""
    try:
        counts = expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        whole = sum(counts) == int(environ["SLURM_NTASKS"])
        return counts if whole and int(environ.get("SLURM_NODEID", 0)) < len(counts) else ()
    except ValueError:
        return ()


def find_point(place: Place, environ: Mapping[str, str]) -> Point:
    """Say where the ranks meet: MASTER_ADDR and MASTER_PORT, else what the launcher tells.

    ConfigError if several hosts have to meet and nothing says where.
    """
    launch = launch_name(place, environ, ()) if _is_named(place, environ) else ""
    port = _port(environ, launch if place.launcher != "torchrun" else "")
    nodes = _nodes_of_ranks(environ) if place.launcher == "Slurm" else ()
    served = place.launcher == "torchrun" and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if address := environ.get("MASTER_ADDR", ""):
        return Point(address, port, "MASTER_ADDR", nodes, launch, served)
    one_host = place.local_ranks == place.ranks
    if one_host and place.launcher in ("Slurm", "Open MPI"):
        return Point("127.0.0.1", port, "all ranks are on this host", nodes, launch)
    job = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")[place.launcher != "Slurm"]
    if place.launcher in ("Slurm", "Open MPI") and (listed := _nodes(environ, job)):
        return Point(listed[0], port, f"the first node of {job}", nodes, launch)
    descriptor = environ.get("PMI_FD", "")
    if place.launcher == "MPICH" and descriptor.isdecimal() and "MASTER_PORT" not in environ:
        host = environ.get("PMI_HOSTNAME", "")
        return Point("", 0, "mpirun", nodes, launch, host=host, descriptor=int(descriptor))
    if place.launcher in ("Slurm", "Open MPI") or (place.launcher == "MPICH" and not one_host):
        flag = "-x MASTER_ADDR=HOST" if place.launcher == "Open MPI" else "MASTER_ADDR=HOST"
        raise ConfigError(
            f"{place.ranks} ranks on several hosts, and {place.launcher} does not say which of "
            "them has rank 0",
            f"start with {flag}, where HOST is the first host, and MASTER_PORT if {port} is taken",
        )
    return Point("127.0.0.1", port, "MASTER_ADDR is not set", nodes, launch)


def _port(environ: Mapping[str, str], launch: str) -> int:
    """MASTER_PORT, else one that follows from the name of the launch: two on a host differ."""
    text = environ.get("MASTER_PORT", "")
    if not text:
        return PORTS[int(launch, 16) % len(PORTS)] if launch else PORT
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise ConfigError(f"MASTER_PORT={text} is not a port", "give a number from 1 to 65535")
    return int(text)


def _is_named(place: Place, environ: Mapping[str, str]) -> bool:
    first = LAUNCH_NAMES.get(place.launcher, ())[:1]
    return any(environ.get(name) for name in first)


def _nodes(environ: Mapping[str, str], variable: str) -> tuple[str, ...]:
    try:
        return expand_nodes(environ.get(variable, ""))
    except ValueError:
        return ()


def _nodes_of_ranks(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The node of each rank of a Slurm step; () where it is not block by block or cyclic."""
    nodes, counts = _nodes(environ, "SLURM_STEP_NODELIST"), _tasks(environ)
    if not nodes or len(nodes) != len(counts):
        return ()
    if environ.get("SLURM_DISTRIBUTION", "block").startswith("cyclic"):
        turns = range(max(counts))
        found = tuple(n for turn in turns for n, c in zip(nodes, counts, strict=True) if turn < c)
    else:
        found = tuple(n for n, c in zip(nodes, counts, strict=True) for _ in range(c))
    # Slurm says of this node which ranks it has: what is found for all nodes must agree.
    own, ranks = environ.get("SLURMD_NODENAME", ""), environ.get("SLURM_GTIDS", "")
    mine = ",".join(str(rank) for rank, node in enumerate(found) if node == own)
    return found if mine == ranks or not (own and ranks) else ()


def find_array(environ: Mapping[str, str]) -> Array | None:
    """Read the task of a Slurm array from the environment; None outside of arrays."""
    names = ("ID", "MIN", "STEP", "COUNT")
    texts = [environ.get(f"SLURM_ARRAY_TASK_{name}", "1") for name in names]
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return None
    try:
        task, first, step, count = (int(text) for text in texts)
        if not (step > 0 and count > 0 and task >= first):
            raise ValueError
    except ValueError:
        said = ", ".join(f"SLURM_ARRAY_TASK_{n}={t}" for n, t in zip(names, texts, strict=True))
        raise ConfigError(f"{said} is no task of an array", "unset them, or use sbatch") from None
    job = environ.get("SLURM_ARRAY_JOB_ID", environ.get("SLURM_JOB_ID", "array"))
    return Array(job, min((task - first) // step, count - 1), count)


def launch_name(place: Place, environ: Mapping[str, str], argv: Sequence[str]) -> str:
    """Return a name that all ranks of one launch share.

    Where the launcher does not name its launches (MPICH), the command line is the name.
    """
    said = [environ[name] for name in LAUNCH_NAMES.get(place.launcher, ()) if name in environ]
    parts = [place.launcher, place.ranks, *(said or argv)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def cores_of(place: Place, environ: Mapping[str, str]) -> int:
    """Return how many of this machine's cores are this rank's.

    A rank that its launcher has bound to some cores has these; others divide what there is.
    """
    asked = environ.get("SLURM_CPUS_PER_TASK", "")
    if place.launcher == "Slurm" and asked.isdecimal():
        return max(1, min(int(asked), cores()))
    bound = place.launcher != "none" and cores() < (os.cpu_count() or 1)
    return cores() if bound else max(1, cores() // max(1, place.local_ranks))
