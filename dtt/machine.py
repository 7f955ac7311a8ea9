"""What the machine gives this process: cores, ports, packages, and how memory is handed out."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import socket
import sys
from importlib.util import find_spec

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


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
