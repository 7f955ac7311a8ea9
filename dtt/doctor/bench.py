"""Measurements in processes of their own: one that crashes, hangs or uses up the memory is a line
in the report, and does not take the report with it.

The processes are forked from a server that has imported torch, which costs seconds once. This
process itself neither computes nor touches a GPU, and the measuring ones share no threads, no
process group and no CUDA context with it or with each other.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from dtt.errors import DttError

T = TypeVar("T")

PRELOADED = ["dtt.verification.report", "torch._dynamo"]
"""What takes long to import and is needed by several measurements."""
LAUNCHERS = ("TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_", "SLURM_", "MPI_LOCAL")
"""Variables of the launcher that started this process: a measurement is not one of its ranks."""

FAREWELL = 2.0
"""Seconds that a process may take to end once it has answered."""


class UnmeasuredError(Exception):
    """A measurement did not come to an end; the text says why."""


class Bench:
    """Runs functions of modules in processes of their own."""

    def __init__(self, debug: bool = False) -> None:
        self.debug = debug
        """Let what the processes write be seen."""
        self._context: Any = multiprocessing.get_context(
            "forkserver" if sys.platform == "linux" else "spawn"
        )

    def warm_up(self) -> None:
        """Begin to import torch in the server; returns at once, and the first run waits for it."""
        if sys.platform == "linux":
            from multiprocessing.forkserver import ensure_running

            self._context.set_forkserver_preload(PRELOADED)
            ensure_running()

    def run(self, function: Callable[..., T], *arguments: Any, seconds: float = 20.0) -> T:
        """Return function(*arguments), computed elsewhere in at most so many seconds.

        Raises what the function raised if that is a DttError, else `UnmeasuredError` with its text.
        """
        receiving, sending = self._context.Pipe(duplex=False)
        with tempfile.TemporaryDirectory(prefix="dtt-doctor-") as folder, receiving:
            log = Path(folder, "output")
            given = (sending, function, arguments, None if self.debug else str(log))
            process = self._context.Process(target=_measure, args=given)
            process.start()
            sending.close()
            try:
                if not receiving.poll(seconds):
                    raise UnmeasuredError(f"it did not end within {seconds:.0f} s{_tail(log)}")
                try:
                    kind, result = receiving.recv()
                except EOFError:
                    process.join()
                    raise UnmeasuredError(f"{ended(process.exitcode)}{_tail(log)}") from None
                process.join(FAREWELL)
            finally:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)  # with the ranks that it has started
                process.kill()
                process.join()
        if kind == "error":
            raise result
        if kind == "text":
            raise UnmeasuredError(result)
        value: T = result
        return value


def _measure(
    sending: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], log: str | None
) -> None:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    handle = 2 if log is None else os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        del os.environ[name]
    try:
        answer: tuple[str, Any] = ("ok", function(*arguments))
    except DttError as error:
        answer = ("error", error)
    except UnmeasuredError as error:
        answer = ("text", str(error))
    except Exception as error:
        traceback.print_exc()
        answer = ("text", f"{type(error).__name__}: {short(str(error))}")
    sending.send(answer)
    sending.close()


def short(text: str, limit: int = 300) -> str:
    """Return a text of several lines in one, cut off where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def ended(code: int | None) -> str:
    """Say how a process ended, by its exit code as multiprocessing has it."""
    if code is not None and code < 0:
        return f"the process died by {signal.Signals(-code).name}"
    return f"the process ended with code {code}"


def _tail(log: Path) -> str:
    """The last line that the process has written, for what it says of the reason."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return f" ({short(lines[-1])})" if lines else ""
