"""The memory of a process, for benchmarks that must not load torch to measure it."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_memory() -> int:
    """Return the most bytes that this process has had in memory."""
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
