"""What the machine gives this process: cores, memory and how the C library hands it out, ports,
packages; and time limits for calls that know none.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
GROUPS = Path("/sys/fs/cgroup")


def keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks instead of returning them to the kernel.

    By default every tensor above 32 MB (and, at first, above 128 kB) is mapped anew for each
    operation, and the kernel clears it page by page; a training step on a CPU loses a tenth to a
    third of its time to that (docs/benchmarks.md). Nothing happens where there is no glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 1 << 28)


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> tuple[float, float]:
    """Return free and total bytes: of the machine, or of this process's control group if that has
    less; zeros where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        rows = {name: float(rest.split()[0]) * 1024 for name, rest in (r.split(":") for r in lines)}
    except (OSError, ValueError):
        return 0.0, 0.0
    free, total = rows.get("MemAvailable", 0.0), rows["MemTotal"]
    for group in _control_groups():
        most, taken = _limit(group)
        if most < total:
            free, total = min(free, most - taken), most
    return max(free, 0.0), total


def _control_groups() -> Iterator[Path]:
    """The folders of the groups whose limits hold for this process: its own, and those above."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    for _, kinds, path in (line.split(":", 2) for line in lines):
        if kinds in ("", "memory"):
            base = GROUPS / kinds
            own = base / path.lstrip("/")
            yield from (each for each in (own, *own.parents) if each.is_relative_to(base))


def _limit(group: Path) -> tuple[float, float]:
    """(limit, bytes taken) of a control group, what the kernel would give back at once left out."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file "),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            most = float((group / limit).read_text(encoding="ascii"))
            taken = float((group / used).read_text(encoding="ascii"))
            rows = (group / "memory.stat").read_text(encoding="ascii").splitlines()
            return most, taken - sum(float(r.split()[1]) for r in rows if r.startswith(cache))
    return float("inf"), 0.0


def is_installed(package: str) -> bool:
    """Whether a package can be imported; a folder of its name (./wandb) without code is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def free_port() -> int:
    """Return a port of this machine that nobody listens on.

    Below those that the kernel hands out (Linux: 32768 to 60999), of which another process could be
    given the same a moment later.
    """
    while True:
        port = random.SystemRandom().randrange(15000, 32768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Task(Generic[T]):
    """A call in a thread of its own, for what knows no time limit and holds signals up.

    Whoever has waited enough goes on without it; it ends with the process.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._found: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait for at most `seconds`; return whether it is done."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> T:
        """Return what the call has returned, or raise what it has raised."""
        if self._error is not None:
            raise self._error
        return self._found[0]

    def _work(self) -> None:
        try:
            self._found.append(self._call())
        except BaseException as error:  # it belongs to the one who waits
            self._error = error


def bounded(call: Callable[[], T], seconds: float) -> T:
    """Return what `call` returns; TimeoutError if it takes longer."""
    task = Task(call)
    if not task.wait(seconds):
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:.0f} s")
    return task.result()
