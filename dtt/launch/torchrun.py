"""One elastic agent per node: torchrun's arguments, with dtt's exit codes and restarts."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from itertools import chain

from dtt.errors import ConfigError
from dtt.launch.job import Job
from dtt.launch.shell import command, environment

EXAMPLES = (
    "dtt launch torchrun -c run.yaml --gpus-per-node 8",
    "dtt launch torchrun -c run.yaml --nodes 4 --gpus-per-node 8 --rdzv-endpoint node1:29400",
    "dtt launch torchrun -c run.yaml --nodes 2:4 --gpus-per-node 8 --rdzv-endpoint node1:29400",
)
MODULE = "dtt.launch.elastic"
"""Takes torchrun's arguments; the ranks' exit codes survive it."""
PORT = 29400
"""Where agents meet unless told: torchrun's own default."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add where the agents meet."""
    parser.add_argument(
        "--rdzv-endpoint",
        type=endpoint,
        metavar="HOST:PORT",
        help=f"node at which the others meet, the same on all (port: {PORT} unless given)",
    )
    parser.add_argument(
        "--rdzv-id", metavar="ID", help="what the nodes of one job have in common (default: name)"
    )


def endpoint(text: str) -> str:
    """Return HOST:PORT as text; the argparse type of an address."""
    match = re.fullmatch(r"([A-Za-z0-9_][\w.-]*|\[[0-9a-fA-F:.]+\])(?::([0-9]{1,5}))?", text)
    if match is None or not 0 < int(match[2] or PORT) < 65536:
        raise argparse.ArgumentTypeError(f"should be HOST:PORT, got {text!r}")
    return f"{match[1]}:{match[2] or PORT}"


def agent(job: Job, meeting: Sequence[str]) -> list[list[str]]:
    """Return the command of a node's agent, which finds the others by the options `meeting`.

    It has two parts: the agent's own words, and those of the ranks.
    """
    nodes = f"{job.fewest_nodes}:{job.nodes}" if job.fewest_nodes else str(job.nodes)
    python, *train = job.train
    size = ["--nnodes", nodes, "--nproc-per-node", str(job.ranks)]
    return [[python, "-m", MODULE, *size, *meeting], train]


def write(job: Job, options: argparse.Namespace) -> str:
    """Return the command that each node has to run."""
    text = f"{command(*_parts(job, options))}\n"
    if job.nodes == 1:
        return text
    return f"# Start this on each of the {job.nodes} nodes, in the same directory.\n{text}"


def run(job: Job, options: argparse.Namespace, text: str) -> int:
    """Become the agent of this node."""
    words = list(chain(*_parts(job, options)))
    if job.nodes > 1:
        others = f"of {job.nodes} nodes: start the same command on the others"
        print(f"dtt launch: one {others}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os.execvp(words[0], words)


def _parts(job: Job, options: argparse.Namespace) -> list[list[str]]:
    if job.nodes == 1:
        meeting = ["--standalone"]
    elif options.rdzv_endpoint is None:
        raise ConfigError(
            f"{job.nodes} nodes need a place to meet",
            "give --rdzv-endpoint HOST:PORT, a free port of one of them that the others can reach",
        )
    else:
        meeting = ["--rdzv-backend", "c10d", "--rdzv-id", options.rdzv_id or job.label]
        meeting += ["--rdzv-endpoint", options.rdzv_endpoint]
    return [*environment(job.environment), *agent(job, meeting)]
