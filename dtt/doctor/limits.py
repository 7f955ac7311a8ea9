"""What the system lets a process have: shared memory, open files, locked memory."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from dtt.doctor.finding import Finding, Subject, failed, ok, skipped, warning

SHARED = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
LEAST_SHARED, ENOUGH_SHARED = 32e6, 500e6
"""Bytes. NCCL takes some 10 MB for each pair of GPUs, and containers have 64 MB unless told."""
LEAST_FILES, ENOUGH_FILES = 256, 1024
"""Open files. A rank has a connection to each of the others, and its shards and logs."""
LEAST_LOCKED = 1 << 30
"""Bytes. InfiniBand's buffers are locked; with less, connections fail one after another."""


def check_shared_memory(subject: Subject) -> Iterator[Finding]:
    try:
        found = os.statvfs(SHARED)
    except OSError:
        yield skipped(f"there is no {SHARED}")
        return
    yield judge_shared_memory(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)


def judge_shared_memory(free: float, total: float) -> Finding:
    """Judge free and total bytes of shared memory."""
    shown = f"{free / 1e9:.2f} of {total / 1e9:.2f} GB free in {SHARED}"
    figures = {"free_gb": round(free / 1e9, 3), "total_gb": round(total / 1e9, 3)}
    mend = (
        "start the container with --shm-size=1g (Kubernetes: an emptyDir of medium Memory at "
        "/dev/shm), or remove what is left there"
    )
    if free < LEAST_SHARED:
        return failed(shown, mend, figures)
    return warning(shown, mend, figures) if free < ENOUGH_SHARED else ok(shown, figures)


def check_open_files(subject: Subject) -> Iterator[Finding]:
    yield judge_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))


def judge_open_files(soft: int, hard: int) -> Finding:
    """Judge the limit of open files and how far it can be raised."""
    shown = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    figures = {"soft": soft, "hard": hard}
    if soft == resource.RLIM_INFINITY or soft >= ENOUGH_FILES:
        return ok(shown, figures)
    can = hard == resource.RLIM_INFINITY or hard >= ENOUGH_FILES
    mend = (
        ("ulimit -n 65536" if hard >= 65536 or hard < 0 else f"ulimit -n {hard}")
        if can
        else "raise nofile in /etc/security/limits.conf"
    )
    return (failed if soft < LEAST_FILES else warning)(shown, f"{mend} before the start", figures)


def check_locked_memory(subject: Subject) -> Iterator[Finding]:
    cards = sorted(path.name for path in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []
    yield judge_locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], cards)


def judge_locked_memory(soft: int, cards: list[str]) -> Finding:
    """Judge the limit of locked bytes, which matters where there is InfiniBand."""
    unlimited = soft == resource.RLIM_INFINITY
    shown = "unlimited" if unlimited else f"{soft / 1e6:,.0f} MB"
    figures = {"bytes": None if unlimited else soft, "infiniband": cards}
    if not cards:
        return ok(f"{shown} (no InfiniBand here, so it does not matter)", figures)
    shown += f", InfiniBand {', '.join(cards)}"
    if not unlimited and soft < LEAST_LOCKED:
        return warning(
            shown,
            "ulimit -l unlimited before the start; in Slurm PropagateResourceLimitsExcept=MEMLOCK "
            "and LimitMEMLOCK=infinity for slurmd",
            figures,
        )
    return ok(shown, figures)
