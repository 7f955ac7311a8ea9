"""Workers that survive the loss of one of them or of a machine.

`dtt train --world-size N` starts them on this machine. On several, start on each of them, with
torchrun's arguments,

    python -m dtt.launch.elastic --nnodes 1:4 --nproc-per-node 8 --rdzv-endpoint HOST:PORT \\
        -m dtt train -c run.yaml

Other than torchrun it ends with dtt's exit codes, does not restart what would fail again, lets the
workers save when it is asked to stop, and counts restarts anew after each new checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed.run as torchrun
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.launcher.api import LaunchConfig

from dtt.config.load import named
from dtt.errors import EXIT_INTERRUPTED, ConfigError, PeerError
from dtt.launch.arguments import train_parser
from dtt.launch.elastic_agent import ENVIRONMENT, Agent, Unlogged
from dtt.launch.elastic_nodes import SETTINGS, OneMachine
from dtt.launch.elastic_worker import Task, work
from dtt.reporting import report_error
from dtt.training.launch import require_layout

PORT = 29400
"""Where the machines meet if --rdzv-endpoint or --master-port does not say it."""
ROLE = "default_role"


def train_here(task: Task) -> int:
    """Train with workers on this machine and return the exit code."""
    parallel = task.config.parallel
    spec = WorkerSpec(
        role=ROLE,
        local_world_size=parallel.world_size,
        rdzv_handler=OneMachine(),
        entrypoint=work,
        max_restarts=parallel.restarts,
    )
    return Agent(spec, Unlogged(), task).train()


def main(argv: Sequence[str]) -> int:
    """Be the launcher of one machine's workers, from torchrun's arguments; return the exit code."""
    try:
        return _launch(argv)
    except KeyboardInterrupt:
        print("dtt train: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except Exception as error:
        return report_error("dtt train", error)


def _launch(argv: Sequence[str]) -> int:
    os.environ.update(ENVIRONMENT)
    options = _parse(argv)
    task = _task(options)
    if options.max_restarts is None:
        options.max_restarts = task.config.parallel.restarts
    try:
        launch, _, _ = torchrun.config_from_args(options)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"launcher: {error}", "see torchrun --help") from error
    require_layout(task.config, launch.max_nodes * launch.nproc_per_node)
    logged = options.log_dir or options.redirects != "0" or options.tee != "0"
    logs: Any = launch.logs_specs if logged else Unlogged()
    return Agent(_spec(launch), logs, task, launch.max_nodes).train()


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read torchrun's arguments; machines that are given by --master-addr meet there as well."""
    parser = torchrun.get_args_parser()
    parser.prog = "python -m dtt.launch.elastic"
    parser.set_defaults(max_restarts=None)
    options = parser.parse_args(list(argv))
    if options.nnodes == "1" and not options.rdzv_endpoint:
        options.standalone = True
    if options.rdzv_backend == "static":
        options.rdzv_backend = "c10d"
        if not options.rdzv_endpoint:
            options.rdzv_endpoint = f"{options.master_addr}:{options.master_port or PORT}"
            # A name of this machine that does not lead to it would have all wait for the first.
            host = f"is_host={int(options.node_rank == 0)}"
            options.rdzv_conf = ",".join(filter(None, (options.rdzv_conf, host)))
    return options


def _task(options: argparse.Namespace) -> Task:
    words = options.training_script_args
    if not options.module or options.training_script not in ("dtt", "dtt.main") or not words:
        raise ConfigError(
            "the launcher starts `-m dtt train ...` and nothing else", "use torchrun for the rest"
        )
    if words[0] != "train":
        raise ConfigError(f"`dtt {words[0]}` needs no ranks that restart", "use torchrun for it")
    parser = train_parser()
    given = parser.parse(words[1:])
    return Task(named(parser.config(given)), given.resume, given.fresh)


def _spec(launch: LaunchConfig) -> WorkerSpec:
    return WorkerSpec(
        role=launch.role,
        local_world_size=launch.nproc_per_node,
        rdzv_handler=_meeting(launch),
        entrypoint=work,
        max_restarts=launch.max_restarts,
        local_addr=launch.local_addr,
        numa_options=launch.numa_options,
        virtual_local_rank=launch.virtual_local_rank,
    )


def _meeting(launch: LaunchConfig) -> Any:
    if launch.max_nodes == 1 and "localhost:0" in launch.rdzv_endpoint:
        return OneMachine()
    parameters = RendezvousParameters(
        backend=launch.rdzv_backend,
        endpoint=launch.rdzv_endpoint,
        run_id=launch.run_id,
        min_nodes=launch.min_nodes,
        max_nodes=launch.max_nodes,
        local_addr=launch.local_addr,
        **(SETTINGS | launch.rdzv_configs),
    )
    try:
        return get_rendezvous_handler(parameters)
    except (RuntimeError, ValueError) as error:
        raise PeerError(
            f"the machines cannot meet at {launch.rdzv_endpoint}: {str(error).splitlines()[0]}",
            "start the launcher on that machine, too, and look at its firewall",
        ) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
