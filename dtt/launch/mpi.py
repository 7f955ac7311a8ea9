"""mpirun of Open MPI, MPICH and Intel MPI, which agree on little more than -n."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence

from dtt.config.parser import at_least
from dtt.errors import ConfigError
from dtt.launch.hosts import add_hosts, address, matching
from dtt.launch.job import Job
from dtt.launch.shell import command, exports

EXAMPLES = (
    "dtt launch mpi -c run.yaml --ranks-per-node 4",
    "dtt launch mpi -c run.yaml --hosts node1,node2 --gpus-per-node 8",
    'dtt launch mpi -c run.yaml --nodes 2 --hostfile "$PBS_NODEFILE" --gpus-per-node 8',
)
FLAVOURS = ("openmpi", "mpich")
FIRST_HOST = "sed -n -E '/^[[:space:]]*(#|$)/!{s/^[[:space:]]*([^[:space:]:]+).*/\\1/p;q;}'"
"""Finds the first host in a host file of either kind (`a slots=8`, `a:8`)."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the hosts, where they meet, and whose mpirun it is."""
    add_hosts(parser, "hosts that mpirun starts ranks on (default: this machine)")
    parser.add_argument("--hostfile", metavar="FILE", help="the same, a host per line")
    parser.add_argument(
        "--master-port",
        type=at_least(1024, maximum=65535),
        default=29500,
        metavar="PORT",
        help="port of the first host at which ranks meet (default: 29500)",
    )
    parser.add_argument(
        "--flavour",
        choices=FLAVOURS,
        metavar="openmpi|mpich",
        help="whose mpirun it is, mpich: Intel's too (default: what `mpirun --version` says)",
    )


SUPERVISE = """\
mpirun=$!
set +m
asked=0
# shellcheck disable=SC2317,SC2329 # the trap calls it
stop() {
  # Open MPI kills its ranks when it gets SIGTERM; SIGUSR1 goes through to them, and they save.
  asked=$((asked + 1))
  if [ "$asked" = 1 ]; then kill -s USR1 "$mpirun"; else kill -s TERM "$mpirun"; fi
}
trap stop INT TERM HUP USR1
while kill -0 "$mpirun" 2>/dev/null; do wait "$mpirun"; done
wait "$mpirun"
"""
"""Waits for mpirun and ends with its exit code; the first signal saves, the second one stops."""


def write(job: Job, options: argparse.Namespace) -> str:
    """Return a script; without --flavour it finds out whose mpirun it has where it runs."""
    first = _first_host(job, options)
    text = f"#!/usr/bin/env bash\ncd {shlex.quote(str(job.directory))} || exit 2\n"
    text += f"{exports(job.environment)}MASTER_ADDR={first}\nMASTER_PORT={options.master_port}\n"
    text += "export MASTER_ADDR MASTER_PORT\n"
    text += "set -m # mpirun has a process group of its own, so that Ctrl-C does not reach it\n"
    if options.flavour == "openmpi":
        text += _openmpi(job, options, "")
    elif options.flavour == "mpich":
        text += _mpich(job, options, "")
    else:
        text += (
            'case "$(mpirun --version 2>&1)" in\n'
            f'  *"Open MPI"* | *OpenRTE*)\n{_openmpi(job, options, "    ")}    ;;\n'
            f"  *) # MPICH, Intel MPI and others with hydra\n{_mpich(job, options, '    ')}    ;;\n"
            "esac\n"
        )
    return text + SUPERVISE


def run(job: Job, options: argparse.Namespace, text: str) -> int:
    """Become that script."""
    if shutil.which("mpirun") is None:
        raise ConfigError(
            "mpirun is not in PATH", "load its module or install Open MPI or MPICH (pip: mpich)"
        )
    if options.hostfile is not None and not os.access(options.hostfile, os.R_OK):
        raise ConfigError(f"--hostfile: cannot read {options.hostfile}", "check the path")
    sys.stdout.flush()
    os.execvp("bash", ["bash", "-c", text, "dtt-launch-mpi"])


def _first_host(job: Job, options: argparse.Namespace) -> str:
    """Return the host of rank 0, as bash."""
    if options.hosts and options.hostfile:
        raise ConfigError("--hosts and --hostfile name the same thing", "give one of them")
    if options.hosts:
        return shlex.quote(address(matching(job, options.hosts)[0]))
    if options.hostfile:
        return f'"$({FIRST_HOST} {shlex.quote(options.hostfile)})"'
    if job.nodes > 1:
        raise ConfigError(
            f"mpi: no hosts are given for {job.nodes} nodes",
            "give --hosts A,B,... or --hostfile FILE",
        )
    return "127.0.0.1"


def _openmpi(job: Job, options: argparse.Namespace, indent: str) -> str:
    where: Sequence[str] = ()
    if options.hosts:
        where = ["--host", ",".join(f"{host}:{job.ranks}" for host in options.hosts)]
    elif options.hostfile:
        where = ["--hostfile", options.hostfile]
    words = ["mpirun", "-n", str(job.nodes * job.ranks), *where]
    words += ["--map-by", f"ppr:{job.ranks}:node:OVERSUBSCRIBE", "--bind-to", "none"]
    for name in _names(job):
        words += ["-x", name]
    return command(words, job.train, indent=indent, end=" </dev/null &") + "\n"


def _mpich(job: Job, options: argparse.Namespace, indent: str) -> str:
    where: Sequence[str] = ()
    if options.hosts:
        where = ["-hosts", ",".join(options.hosts)]
    elif options.hostfile:
        where = ["-f", options.hostfile]
    words = ["mpirun", "-n", str(job.nodes * job.ranks), "-ppn", str(job.ranks), *where]
    words += ["-genvlist", ",".join(_names(job))]
    return command(words, job.train, indent=indent, end=" </dev/null &") + "\n"


def _names(job: Job) -> list[str]:
    """Return the names of the variables that ranks on other hosts must have."""
    return ["MASTER_ADDR", "MASTER_PORT", *(name for name, _ in job.environment)]
