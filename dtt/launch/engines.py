"""The engines that start jobs."""

from __future__ import annotations

from typing import NamedTuple


class Engine(NamedTuple):
    """An engine: a module with add_options(parser), write(job, options), run(job, options, text).

    `write` is pure: the command, script or manifest as text; `run` runs or submits it. Its
    EXAMPLES are command lines.
    """

    summary: str
    module: str
    elastic: bool = False
    """Whether it can go on with fewer nodes: --nodes MIN:MAX."""


ENGINES = {
    "local": Engine("Ranks on this machine.", "dtt.launch.local"),
    "torchrun": Engine("An agent per node, started by hand.", "dtt.launch.torchrun", True),
    "slurm": Engine("A batch job of Slurm.", "dtt.launch.slurm"),
    "mpi": Engine("mpirun of Open MPI, MPICH or Intel MPI.", "dtt.launch.mpi"),
    "ssh": Engine("Bare machines over ssh.", "dtt.launch.ssh", True),
    "k8s": Engine("A Job of Kubernetes, or a PyTorchJob.", "dtt.launch.kubernetes"),
    "skypilot": Engine("Machines of a cloud, through SkyPilot.", "dtt.launch.skypilot"),
}
