"""GPUs: what they are, who else uses them, and what they reach of what their maker publishes.

`ask_nvidia_smi` needs no PyTorch; `measure` runs in a process of the bench. The judgements are pure
functions of figures, so that they are tested on machines without a GPU.
"""

from __future__ import annotations

import csv
import re
import subprocess
from collections.abc import Iterator
from statistics import median
from typing import Any

from dtt.doctor.finding import Finding, Subject, failed, ok, skipped, warning

BLOCK = 1 << 30
"""Bytes that are copied within the GPU; a quarter of it to and from the host."""
ENOUGH = 0.55
"""Share of the published rate below which a GPU is slow: products of this size reach 60% to 80%."""
LINK = 6.0
"""GB/s below which the way to the host is slow: PCIe 3.0 x8 has 7.9, x16 15.8."""
FREE = 0.9
"""Share of the memory that should be free before training."""
APART = 0.85
"""Share of the median below which one of several alike is slow."""

MEMORY_AND_LINK = {
    "B200": (8000, 900),
    "GH200": (4000, 450),
    "H200 NVL": (4800, 450),
    "H200": (4800, 450),
    "H100 PCIe": (2000, 0),
    "H100 NVL": (3900, 300),
    "H100": (3350, 450),
    "A100-PCIE-40GB": (1555, 0),
    "A100 80GB PCIe": (1935, 0),
    "A100-SXM4-40GB": (1555, 300),
    "A100": (2039, 300),
    "L40S": (864, 0),
    "A10": (600, 0),
    "L4": (300, 0),
    "RTX 4090": (1008, 0),
    "RTX 3090": (936, 0),
}
"""GB/s of the memory, and of NVLink in each direction (0: none), by the maker's data sheet. The
first name that a GPU's own contains counts, as in `dtt.metrics.peak`, which has its FLOP/s."""
QUERY = ("name", "driver_version", "memory.total", "ecc.errors.uncorrected.volatile.total", "uuid")


def published_rates(name: str, dtype: Any) -> dict[str, float | None]:
    """Return what is published of a GPU, under the names of what is measured; None: not known."""
    from dtt.metrics.peak import published

    flops = published(name, dtype)
    names = (known for known in MEMORY_AND_LINK if re.search(rf"\b{re.escape(known)}\b", name))
    # A chip of another kind that is called after one of these (Laptop, MIG) has no FLOP/s there.
    known = next(names, None) if flops else None
    memory, link = MEMORY_AND_LINK[known] if known else (None, None)
    return {
        "published_matmul_tflops": flops / 1e12 if flops else None,
        "published_copy_gb_s": memory,
        "published_link_gb_s": link,
    }


def ask_nvidia_smi() -> list[dict[str, Any]]:
    """Return what nvidia-smi says of each GPU; an empty list where there is none."""
    form = "--format=csv,noheader,nounits"
    rows = nvidia_smi("--query-gpu=" + ",".join(QUERY), form)
    apps = nvidia_smi("--query-compute-apps=gpu_uuid,pid,used_memory", form)
    return parse_nvidia_smi(rows, apps)


def parse_nvidia_smi(rows: str, apps: str) -> list[dict[str, Any]]:
    """Read the two CSV answers of nvidia-smi."""
    users: dict[str, list[int]] = {}
    for uuid, pid, *_ in _cells(apps):
        users.setdefault(uuid, []).append(int(pid))
    found = []
    for name, driver, memory, errors, uuid in _cells(rows):
        found.append(
            {
                "name": name,
                "driver": driver,
                "memory_mib": int(memory) if memory.isdecimal() else None,
                "ecc_errors": int(errors) if errors.isdecimal() else None,
                "processes": users.get(uuid, []),
                "uuid": uuid,
            }
        )
    return found


def _cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if len(row) > 1]


def nvidia_smi(*words: str) -> str:
    """Return what nvidia-smi prints; nothing where it is not there or fails."""
    command = ["nvidia-smi", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def check_gpus(subject: Subject) -> Iterator[Finding]:
    smi = {row["uuid"]: row for row in ask_nvidia_smi()}
    found = subject.bench.run(measure, not subject.quick, seconds=60)
    if not found:
        why = "no NVIDIA GPU" if not smi else "PyTorch sees none of this machine's GPUs"
        yield skipped(f"{why}: training would use the CPU")
        return
    for row in found:
        row |= {k: v for k, v in smi.get(row["uuid"], {}).items() if k != "name"}
    subject.gpus = found
    for index, row in enumerate(found):
        yield judge(index, row, found)


def measure(rates: bool) -> list[dict[str, Any]]:
    """Return name, memory and, if asked, rates of each GPU that PyTorch sees."""
    import torch

    from dtt.precision import choose_precision

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        torch.cuda.set_device(index)
        free, total = torch.cuda.mem_get_info(index)
        about, device = torch.cuda.get_device_properties(index), torch.device("cuda", index)
        dtype, _ = choose_precision("auto", device)
        row: dict[str, Any] = {
            "name": about.name,
            "uuid": f"GPU-{getattr(about, 'uuid', index)}",
            "memory_total_gb": total / 1e9,
            "memory_free_gb": free / 1e9,
            "capability": f"{about.major}.{about.minor}",
            **published_rates(about.name, dtype),
        }
        if rates and free > 3 * BLOCK:
            row |= _rates(device, dtype)
        found.append(row)
    return found


def _rates(device: Any, dtype: Any) -> dict[str, float]:
    import torch

    from dtt.metrics import peak

    flops = peak.measure(device, dtype)
    source = torch.zeros(BLOCK // 4, device=device)
    target = torch.empty_like(source)
    copy = _timed(lambda: target.copy_(source), 10)
    host = torch.empty(BLOCK // 16, pin_memory=True)
    part = target[: len(host)]
    to_gpu = _timed(lambda: part.copy_(host, non_blocking=True), 5)
    to_host = _timed(lambda: host.copy_(part, non_blocking=True), 5)
    return {
        "matmul_tflops": flops / 1e12,
        "copy_gb_s": 2 * BLOCK / copy / 1e9,
        "to_gpu_gb_s": BLOCK / 4 / to_gpu / 1e9,
        "to_host_gb_s": BLOCK / 4 / to_host / 1e9,
    }


def _timed(work: Any, times: int) -> float:
    """Seconds of one call, the mean of so many after two that warm up."""
    import torch

    for _ in range(2):
        work()
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000 / times


def judge(index: int, row: dict[str, Any], rows: list[dict[str, Any]]) -> Finding:
    """Judge one GPU of several by its figures, against what is published and against the others."""
    name, total, free = f"GPU {index}", row["memory_total_gb"], row["memory_free_gb"]
    shown = f"{row['name']}, {free:.1f} of {total:.1f} GB free, capability {row['capability']}"
    slow = []
    for figure, unit, what in (
        ("matmul_tflops", "TFLOP/s", "matmul"),
        ("copy_gb_s", "GB/s", "copy"),
    ):
        if figure not in row:
            continue
        limit = row.get(f"published_{figure}")
        share = row[figure] / limit if limit else None
        of = f" ({share:.0%} of the published {limit:,.0f})" if share else ""
        shown += f", {what} {row[figure]:,.0f} {unit}{of}"
        usual = median(other[figure] for other in rows if figure in other)
        if share is not None and share < ENOUGH:
            slow.append(f"its {what} is slow")
        elif row[figure] < APART * usual:
            slow.append(f"its {what} is {1 - row[figure] / usual:.0%} below the other GPUs'")
    if "to_gpu_gb_s" in row:
        shown += f", host to GPU {row['to_gpu_gb_s']:.0f} GB/s, back {row['to_host_gb_s']:.0f} GB/s"
        if min(row["to_gpu_gb_s"], row["to_host_gb_s"]) < LINK:
            slow.append("the way to the host is slow")
    if row.get("ecc_errors"):
        return failed(
            f"{shown}; {row['ecc_errors']} uncorrected memory errors",
            "leave this GPU out (CUDA_VISIBLE_DEVICES) and have it reset or replaced",
            row,
            name=name,
        )
    if row.get("processes") or free < FREE * total:
        pids = ", ".join(map(str, row.get("processes") or [])) or "unknown"
        return warning(
            f"{shown}; other programs use it (process {pids})",
            "end them, or choose other GPUs with CUDA_VISIBLE_DEVICES",
            row,
            name=name,
        )
    if slow:
        return warning(
            f"{shown}; {', '.join(slow)}",
            "nvidia-smi -q -d PERFORMANCE,CLOCK says what holds it back (heat, power cap), "
            "nvidia-smi -q -d PCIE its link; leave it out with CUDA_VISIBLE_DEVICES",
            row,
            name=name,
        )
    return ok(shown, row, name=name)
