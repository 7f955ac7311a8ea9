"""The CPU: cores, what other programs take of them, memory, the rates of products and copies."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dtt.doctor.finding import Finding, Subject, ok, skipped, warning
from dtt.machine import cores, memory

PRODUCTS = 0.8
"""Seconds for which products are timed, in each arithmetic."""
COPIED = 256 << 20
"""Bytes that are copied: more than any cache."""
BUSY = 0.25
"""Share of the cores that other programs may use without a word."""
SCARCE = 2e9
"""Bytes of free memory below which there is a warning."""
WATCHED = 0.3
"""Seconds for which the machine is watched before the examination begins."""


def busy_cores(seconds: float = WATCHED) -> float:
    """Return how many of this process's cores are busy, as seen for so many seconds.

    Call it before dtt itself computes. 0 where the system does not tell (no Linux).
    """
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    spent = [
        (busy - before[core][0]) / max(1, total - before[core][1])
        for core, (busy, total) in after.items()
        if core in before
    ]
    return sum(spent)


def _ticks() -> dict[str, tuple[int, int]]:
    """(busy, all) ticks of each core that this process may use."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    mine, found = {f"cpu{core}" for core in os.sched_getaffinity(0)}, {}
    for name, *numbers in map(str.split, lines):
        if name in mine:
            ticks = [int(number) for number in numbers[:8]]
            idle = ticks[3] + ticks[4]
            found[name] = (sum(ticks) - idle, sum(ticks))
    return found


def check_cores(subject: Subject) -> Iterator[Finding]:
    yield judge_cores(cores(), os.cpu_count() or 1, subject.busy)


def judge_cores(mine: int, there: int, busy: float) -> Finding:
    """Judge how many cores there are for training."""
    shown = f"{mine}" if mine == there else f"{mine} of the machine's {there}"
    shown += f", {busy:.1f} of them busy with other programs"
    figures = {"cores": mine, "cores_of_machine": there, "busy_cores": round(busy, 2)}
    if busy > BUSY * mine:
        return warning(
            shown,
            "end them, or wait: training will be slower, and the rates below are too low",
            figures,
        )
    return ok(shown, figures)


def check_memory(subject: Subject) -> Iterator[Finding]:
    yield judge_memory(*memory())


def judge_memory(free: float, total: float) -> Finding:
    """Judge free and total memory in bytes."""
    if not total:
        return skipped("this system does not say how much memory it has")
    shown = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    figures = {"free_gb": round(free / 1e9, 2), "total_gb": round(total / 1e9, 2)}
    if free < SCARCE:
        mend = "end other programs, or ask for more memory (--mem in Slurm)"
        return warning(shown, mend, figures)
    return ok(shown, figures)


def check_matmul(subject: Subject) -> Iterator[Finding]:
    yield judge_matmul(subject.bench.run(measure_matmul, cores(), seconds=30))


def measure_matmul(threads: int) -> dict[str, Any]:
    """Return GFLOP/s of products in fp32 and bf16, and whether bf16 is native."""
    import torch

    from dtt.metrics.peak import measure
    from dtt.precision import DTYPES, cpu_has_bf16

    torch.set_num_threads(threads)
    found: dict[str, Any] = {"bf16_is_native": cpu_has_bf16(), "threads": threads}
    for name in ("fp32", "bf16"):
        flops = measure(torch.device("cpu"), DTYPES[name], PRODUCTS)
        found[f"{name}_gflops"] = round(flops / 1e9, 1)
    return found


def judge_matmul(found: dict[str, Any]) -> Finding:
    """Judge the rates of products; bf16 must be worth its while where dtt would choose it."""
    fp32, bf16, native = found["fp32_gflops"], found["bf16_gflops"], found["bf16_is_native"]
    shown = (
        f"{fp32:.0f} GFLOP/s in fp32, {bf16:.0f} in bf16 ({'' if native else 'not '}native) on "
        f"{found['threads']} threads"
    )
    if native and bf16 < fp32:
        return warning(shown, "train with --precision fp32: bf16 is slower here", found)
    return ok(shown, found)


def check_copy(subject: Subject) -> Iterator[Finding]:
    rate = subject.bench.run(measure_copy, cores())
    yield ok(f"{rate:.1f} GB/s copied in memory", {"copy_gb_s": round(rate, 2)})


def measure_copy(threads: int) -> float:
    """Return GB/s that copies read and write together."""
    import torch

    torch.set_num_threads(threads)
    source = torch.zeros(COPIED // 4)
    target = torch.empty_like(source)
    return 2 * COPIED / best(lambda: target.copy_(source), 0.5) / 1e9


def best(work: Callable[[], Any], seconds: float) -> float:
    """Return the seconds of the quickest of the calls that fit into so many; of three at least.

    The quickest, since what else the machine does can only make a call slower.
    """
    work()
    found: list[float] = []
    begun = time.perf_counter()
    while len(found) < 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)
