"""A worker: one rank in a process that the launcher of its machine has forked."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import threading
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn

from dtt.config.schema import Config
from dtt.dist import find_place, leave
from dtt.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from dtt.training.launch import train_rank
from dtt.training.preemption import SIGNALS, exit_on_preemption


@dataclass(frozen=True)
class Task:
    """What every worker is to do."""

    config: Config
    resume: str | Path | None
    fresh: bool


def work(task: Task, spoken: Any) -> NoReturn:
    """Be one rank; never returns, and says what went wrong by itself (`spoken`: once a machine).

    The launcher forks with SIGNALS blocked, so that none of them can meet this process before it
    has handlers of its own.
    """
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        with exit_on_preemption():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            _close_sockets()
            threading.Thread(target=_follow_parent, daemon=True).start()
            place = find_place(os.environ)
            on_first_machine = place.rank == place.local_rank
            code = train_rank(task.config, task.resume, task.fresh, on_first_machine, spoken)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except SystemExit:
        code = EXIT_PREEMPTED
    leave(code)


def _close_sockets() -> None:
    """Close the launcher's connections: through a copy of them it would seem alive when it died."""
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        handle = int(name)
        try:
            if handle > 2 and stat.S_ISSOCK(os.fstat(handle).st_mode):
                os.close(handle)
        except OSError:  # the folder's own handle
            continue


def _follow_parent() -> None:
    """Stop this rank, after a save, when the process that started it has died."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
