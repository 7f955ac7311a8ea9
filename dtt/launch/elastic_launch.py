"""The launcher of a machine's workers, from a configuration or from torchrun's arguments."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed.run as torchrun
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig

from dtt import network
from dtt.config.load import named
from dtt.errors import ConfigError, PeerError
from dtt.launch.arguments import train_parser
from dtt.launch.elastic_agent import ENVIRONMENT, Agent, Unlogged, say
from dtt.launch.elastic_nodes import SETTINGS, OneMachine
from dtt.launch.elastic_worker import Task, work
from dtt.launch.torchrun import PORT
from dtt.training.batching import require_layout

PAUSE = 1.0
"""Seconds between two tries to reach the place where the machines meet."""
UNSAID = 5.0
"""Seconds that machines may start one after the other without a word of it."""
ANSWER = 3.0
"""Seconds that it has to answer."""
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


def train_on_nodes(argv: Sequence[str]) -> int:
    """Be the launcher of one machine of a run, from torchrun's arguments; return the exit code."""
    os.environ.update(ENVIRONMENT)
    options = _parse(argv)
    task = _task(options)
    if options.max_restarts is None:
        options.max_restarts = task.config.parallel.restarts
    with _as_config_errors():
        launch, _, _ = torchrun.config_from_args(options)
    require_layout(task.config, launch.max_nodes * launch.nproc_per_node)
    logged = options.log_dir or options.redirects != "0" or options.tee != "0"
    logs: Any = launch.logs_specs if logged else Unlogged()
    with _as_config_errors():
        spec = _spec(launch)
    return Agent(spec, logs, task, launch.max_nodes, launch.rdzv_endpoint).train()


@contextmanager
def _as_config_errors() -> Iterator[None]:
    """Inside, what torch says of arguments that it cannot take is a ConfigError."""
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"launcher: {error}", "see torchrun --help") from error


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
        raise ConfigError(
            f"this launcher starts `dtt train`, and not `dtt {words[0]}`", "use torchrun for it"
        )
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
    begun, waits = time.monotonic(), False
    place = parse_rendezvous_endpoint(launch.rdzv_endpoint, PORT)
    while True:
        try:
            _look_for(parameters)
            return get_rendezvous_handler(parameters)
        except RendezvousConnectionError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
        except OSError as error:
            reason, _ = network.explain(error, *place)
        waited = time.monotonic() - begun
        if waited > float(parameters.config["join_timeout"]):
            raise PeerError(
                f"the machines cannot meet at {launch.rdzv_endpoint}: {reason}",
                "start the launcher on that machine, too, and look at its firewall",
            )
        if waited > UNSAID and not waits:
            where = f"{launch.rdzv_endpoint}, where the machines of this run meet"
            say(f"waiting for {where}: {reason}")
            waits = True
        time.sleep(PAUSE)


def _look_for(parameters: RendezvousParameters) -> None:
    """Raise OSError where the machine at which all meet is another, and does not answer.

    torch's store would write pages about each try, and not why.
    """
    host, port = parse_rendezvous_endpoint(parameters.endpoint, PORT)
    is_here = parameters.get_as_bool("is_host")
    if is_here is None:
        is_here = any(map(network.is_own, network.resolve(host, port, ANSWER)))
    if parameters.backend == "c10d" and not is_here:
        network.reach(host, port, ANSWER)
