"""Ranks that do nothing but meet, each in a forked process; on request in a network of its own."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dtt import dist, machine
from dtt.errors import EXIT_INTERNAL, EXIT_PREEMPTED, DttError
from dtt.place import find_place
from dtt.rendezvous import alarm, room
from dtt.reporting import report_error
from dtt.training.preemption import exit_on_preemption

CLONE_NEWNET, CLONE_NEWUTS = 0x40000000, 0x04000000
PATIENCE = 60.0


@dataclass(frozen=True)
class Ended:
    """How a rank ended, and how many seconds after its start."""

    code: int
    out: str
    err: str
    seconds: float


class Rank:
    """A rank that starts at once. `node` names the network namespace and host where it runs."""

    def __init__(
        self,
        folder: Path,
        name: str,
        environ: Mapping[str, str],
        *,
        seconds: float = 20.0,
        facts: Mapping[str, str] | None = None,
        node: str = "",
        fail: str = "",
    ) -> None:
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["dtt.dist", "dtt.training.preemption", "meeting_ranks"])
        self.files = [folder / f"{name}.{stream}" for stream in ("out", "err")]
        arguments = (self.files, dict(environ), seconds, dict(facts or {}), node, fail)
        self.process = context.Process(target=_main, args=arguments)
        self.begun = time.monotonic()
        self.process.start()

    def said(self, text: str) -> None:
        """Wait until its stderr or stdout has `text`."""
        deadline = time.monotonic() + PATIENCE
        while not any(file.exists() and text in file.read_text() for file in self.files):
            assert time.monotonic() < deadline, f"never said {text!r}"
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> Ended:
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still there: {self.files[1].read_text()}")
        out, err = (file.read_text() for file in self.files)
        return Ended(self.process.exitcode, out, err, time.monotonic() - self.begun)


def free_port() -> str:
    return str(machine.free_port())


def by_hand(rank: int, ranks: int, port: str, **more: str) -> dict[str, str]:
    """The environment of a rank that a person starts."""
    return {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": port, **more}


def _main(
    files: list[Path],
    environ: dict[str, str],
    seconds: float,
    facts: dict[str, str],
    node: str,
    fail: str,
) -> None:
    for file, stream in zip(files, (1, 2), strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if node:
        _enter(node)
    for name in [name for name in os.environ if name.startswith(("MASTER_", "SLURM_", "GLOO_"))]:
        del os.environ[name]
    os.environ.update(environ)
    room.FIRST_WORD, alarm.GRACE = 0.5, 0.5
    torch.set_num_threads(1)
    print("begun", flush=True)
    try:
        code = _meet(seconds, facts, fail)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except KeyboardInterrupt:
        code = 130
    dist.leave(code)


@exit_on_preemption()
def _meet(seconds: float, facts: dict[str, str], fail: str) -> int:
    try:
        runtime = dist.start(find_place(os.environ), "cpu", 1, facts, seconds)
        with runtime.sharing_failures():
            if fail == "raise":
                raise DttError("the disk is full", "free some space")
            if fail == "hang":  # as in a collective of NCCL that another rank does not come to
                time.sleep(PATIENCE)
            if fail == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fail == "stop":
                raise SystemExit(EXIT_PREEMPTED)
            total = float(runtime.sum(torch.ones(1))[0])
            interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
            print(f"met {total:.0f} through {interface}", flush=True)
        runtime.close()
        return 0
    except DttError as error:
        return report_error("dtt", error)
    except Exception as error:
        print(repr(error), file=sys.stderr)
        return EXIT_INTERNAL


def _enter(node: str) -> None:
    """Be on another host from here on: its network (a namespace of that name) and its name."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{node}") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) or libc.unshare(CLONE_NEWUTS):
            raise OSError(ctypes.get_errno(), "setns")
    socket.sethostname(node)
