"""Who this process is among the ranks that a launcher started.

The only reader of RANK, SLURM_*, OMPI_* and PMI_*. It needs neither torch nor an MPI library:
launchers say all of it in the environment.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dtt.errors import ConfigError
from dtt.machine import cores

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
class Array:
    """The task of a Slurm array that this process belongs to, counted from 0."""

    job: str
    task: int
    tasks: int


def find_place(environ: Mapping[str, str]) -> Place:
    """Read rank and world size from the environment of torchrun, MPI or Slurm, else one rank."""
    for launcher, (rank, size, local, local_size) in LAUNCHERS.items():
        if rank not in environ or size not in environ:
            continue
        # An interactive Slurm shell has these variables too, but no step of its own.
        if launcher == "Slurm" and environ.get("SLURM_STEP_ID", "") in ("", "batch", "interactive"):
            continue
        try:
            ranks = int(environ[size])
            local_ranks = int(environ.get(local_size, "1").split("(")[0])
            local_rank = int(environ.get(local, 0))
            return Place(int(environ[rank]), ranks, local_rank, local_ranks, launcher)
        except ValueError:
            raise ConfigError(
                f"{rank}={environ[rank]} and {size}={environ[size]} are not numbers",
                "unset them or start through torchrun",
            ) from None
    return Place()


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
