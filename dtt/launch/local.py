"""Ranks on this machine: `dtt train --world-size R`."""

from __future__ import annotations

import argparse
import os
import sys
from itertools import chain

from dtt.errors import ConfigError
from dtt.launch.job import Job
from dtt.launch.shell import command, environment

EXAMPLES = ("dtt launch local -c run.yaml --gpus-per-node 8",)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add nothing: what there is to say is said for all engines."""


def write(job: Job, options: argparse.Namespace) -> str:
    """Return the command; ConfigError where the job needs other machines."""
    return f"{command(*_parts(job))}\n"


def run(job: Job, options: argparse.Namespace, text: str) -> int:
    """Become that command, so that signals and the exit code are its own."""
    words = list(chain(*_parts(job)))
    sys.stdout.flush()
    os.execvp(words[0], words)


def _parts(job: Job) -> list[list[str]]:
    if job.nodes > 1:
        raise ConfigError(
            f"--nodes {job.nodes}: `local` starts ranks on this machine",
            "use torchrun, ssh, mpi or slurm",
        )
    return [*environment(job.environment), [*job.train, "--world-size", str(job.ranks)]]
