"""Starting ranks: this process alone, the ones a launcher started, or workers of our own."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch.distributed import DistError

from dtt.config.load import named
from dtt.config.schema import Config
from dtt.data.corpora import prepare_corpora
from dtt.data.progress import progress
from dtt.dist import find_place, leave, start
from dtt.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    ConfigError,
    DataError,
    PeerError,
)
from dtt.parallel.layout import resolve
from dtt.reporting import report_error
from dtt.training.batching import divide
from dtt.training.engine import fit, require_engine
from dtt.training.folder import run_folder
from dtt.training.loop import closing_lines
from dtt.training.picture import draw_loss, sparkline
from dtt.training.preemption import exit_on_preemption
from dtt.training.run import open_run
from dtt.version import __version__

GRACE = 10.0
"""Seconds that the other workers have to end by themselves when one has failed."""


@dataclass(frozen=True)
class Trained:
    """What `train` returns."""

    folder: Path
    step: int
    complete: bool
    """False when a signal stopped the run; the same call goes on."""
    best_loss: float | None


@exit_on_preemption()
def train(config: Config, *, resume: str | Path | None = None, fresh: bool = False) -> Trained:
    """Train as this process's rank (alone, or as torchrun, Slurm or MPI placed it).

    Continues the run of this name if there is one. Raises the errors of dtt.errors.
    """
    config, place = named(config), find_place(os.environ)
    if place.launcher == "none" and config.parallel.world_size > 1:
        raise ConfigError(
            f"parallel.world_size is {config.parallel.world_size}, but this is one process",
            "start workers with `dtt train` or torchrun",
        )
    layout = resolve(config.parallel, config.model, place.ranks)
    divide(config.training, layout.data, layout.pipeline)
    runtime = start(place, config.training.device, config.training.threads)
    runtime.agree(
        {
            "version of dtt": __version__,
            "version of PyTorch": torch.__version__,
            "configuration": hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12],
        }
    )
    begun = time.perf_counter()
    with open_run(config, runtime, str(resume) if resume else None, fresh) as run:
        if run.state.step >= run.steps:
            run.reporter.info(f"{run.folder} is already complete: {run.state.step} steps")
        else:
            fit(run)
            if runtime.is_main and run.state.step >= run.steps:
                draw_loss(run.folder, run.reporter.warning)
                run.reporter.info(sparkline(run.folder))
            for line in closing_lines(run, time.perf_counter() - begun):
                run.reporter.info(line)
        trained = Trained(
            run.folder, run.state.step, run.state.step >= run.steps, run.state.best_loss
        )
    runtime.close()
    return trained


def launch_training(config: Config, *, resume: str | Path | None, fresh: bool) -> int:
    """Train, with as many workers as the configuration asks for, and return the exit code."""
    place, workers = find_place(os.environ), config.parallel.world_size
    if place.launcher == "none" and workers > 1:
        layout = resolve(config.parallel, config.model, workers)
        divide(config.training, layout.data, layout.pipeline)
        require_engine(config.training)
        return _run_workers(config, workers, resume, fresh)
    if place.ranks > 1:
        leave(_rank(config, resume, fresh, place.rank == 0))
    return EXIT_DONE if train(config, resume=resume, fresh=fresh).complete else EXIT_PREEMPTED


def _rank(
    config: Config, resume: str | Path | None, fresh: bool, speaks: bool, spoken: Any = None
) -> int:
    """Train as one of several ranks and return the exit code.

    What ends all ranks alike is said once: by the rank that `speaks`, or, where ranks share the
    flag `spoken`, by the first that fails.
    """
    try:
        return EXIT_DONE if train(config, resume=resume, fresh=fresh).complete else EXIT_PREEMPTED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemExit as stop:
        return int(stop.code or 0)
    except Exception as error:
        if config.logging.level == "debug":
            traceback.print_exc()
        if isinstance(error, DistError) or "gloo/transport" in str(error):
            lost = PeerError("another rank was lost", "see its messages; the same command goes on")
            return report_error("dtt train", lost, quiet=spoken is not None)
        if spoken is None:
            shared = isinstance(error, ConfigError | DataError)
            return report_error("dtt train", error, quiet=shared and not speaks)
        with spoken.get_lock():
            code = report_error("dtt train", error, quiet=bool(spoken.value))
            spoken.value = 1
        return code


def _run_workers(config: Config, workers: int, resume: str | Path | None, fresh: bool) -> int:
    """Fork one process per rank and wait; the first that fails decides the exit code."""
    with progress() as advance:  # not while ranks wait for each other, which has a time limit
        prepare_corpora(config.data, config.tokenizer, report=_warn, advance=advance)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(free_port())
    # Forked workers share the imports of this process, which must not have used OpenMP or CUDA.
    start_method = "fork" if sys.platform == "linux" else "spawn"
    context: Any = multiprocessing.get_context(start_method)
    processes: list[BaseProcess] = []
    spoken = context.Value("b", 0)
    for rank in range(workers):
        arguments = (rank, workers, config, resume, fresh, spoken)
        process = context.Process(target=_worker, args=arguments)
        process.start()
        processes.append(process)
    with _forwarded_signals(processes):
        failed = _wait(processes)
    if failed is None:
        codes = {process.exitcode for process in processes}
        return EXIT_PREEMPTED if EXIT_PREEMPTED in codes else EXIT_DONE
    rank, code = failed
    if code < 0:
        name = signal.Signals(-code).name
        raise PeerError(
            f"rank {rank} of {workers} died by {name}",
            f"the same command{' without --fresh' * fresh} goes on from the last checkpoint in "
            f"{run_folder(config)}",
        )
    return code


def _worker(
    rank: int, ranks: int, config: Config, resume: str | Path | None, fresh: bool, spoken: Any
) -> NoReturn:
    """One rank: its own errors are printed here, since only its exit code goes to the parent.

    Where several ranks fail, alike or one because of another, the first one speaks (`spoken`).
    """
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks)
    )
    threading.Thread(target=_follow_parent, daemon=True).start()
    leave(_rank(config, resume, fresh, True, spoken))


def _follow_parent() -> None:
    """Stop this rank, after a save, when the process that started it has died."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _wait(processes: list[BaseProcess]) -> tuple[int, int] | None:
    """Wait for all; return (rank, code) of the first that failed, having ended the others."""
    bad: list[tuple[int, int]] = []
    deadline = float("inf")
    alive = True
    while alive:
        # Asked before the exit codes are looked at: one that ends in between has its turn again.
        alive = any(process.is_alive() for process in processes)
        wait([p.sentinel for p in processes if p.is_alive()], 0.2)
        for rank, process in enumerate(processes):
            code = process.exitcode
            if code not in (None, EXIT_DONE, EXIT_PREEMPTED) and (rank, code) not in bad:
                bad.append((rank, code or 0))
        if bad and deadline == float("inf"):
            deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
    # A rank that died by a signal is the cause; that others lost it is the consequence.
    bad.sort(key=lambda item: (item[1] >= 0, item[1] == PeerError.exit_code))
    return bad[0] if bad else None


@contextlib.contextmanager
def _forwarded_signals(processes: list[BaseProcess]) -> Iterator[None]:
    """Pass signals on to the workers, which act on them; Ctrl-C reaches them by itself."""

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGUSR1)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _warn(text: str) -> None:
    print(f"dtt train: warning: {text}", file=sys.stderr, flush=True)


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
