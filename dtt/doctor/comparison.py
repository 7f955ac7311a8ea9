"""What machines say beside each other: what differs, who is slow or lost, whose clock is wrong.

Pure functions of what the machines have found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from dtt.doctor.finding import PEERS, SETUP, Finding, failed, ok, warning
from dtt.doctor.link import SHARE_OF_LINK
from dtt.doctor.report import Node

APART = 0.85
"""Share of the nodes' median below which one is slow."""
DISK_APART = 0.5
"""The same for disks, whose rates vary: all nodes write at once, often to one disk."""
CLOCKS = 1.0
"""Seconds that clocks may differ by: logs and file times are compared across machines."""
LOST = "see its messages and its machine's (memory, disk, power), or go on without it"
"""How to mend the loss of a rank."""
RATES = {
    "matmul": (("fp32_gflops", "GFLOP/s in fp32"), ("bf16_gflops", "GFLOP/s in bf16")),
    "copy": (("copy_gb_s", "GB/s copied in memory"),),
    "disk speed": (("write_mb_s", "MB/s written"), ("read_mb_s", "MB/s read")),
    "GPU": (("matmul_tflops", "TFLOP/s of the GPU"), ("copy_gb_s", "GB/s copied in the GPU")),
}
"""Figures in which nodes should be alike, by the check that has them (GPU: of each one)."""
VERSIONS = {
    "python": ("version",),
    "packages": ("dtt", "torch", "numpy", "tokenizers", "safetensors"),
    "pytorch": ("torch", "cuda", "nccl", "driver"),
}


def compare(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Find what differs between nodes: versions, and rates far below the median."""
    yield shared(judge_versions(nodes), "versions", SETUP)
    for finding in judge_rates(nodes):
        yield shared(finding, "rates", SETUP)


def judge_versions(nodes: Sequence[Node]) -> Finding:
    """All nodes must run the same dtt, PyTorch, NCCL; what differs is named with its nodes."""
    wrong, figures = [], {}
    for check, keys in VERSIONS.items():
        for key in keys:
            said = {node.name: _figure(node, check, key) for node in nodes}
            if len(set(said.values())) > 1:
                figures[f"{check} {key}"] = said
                name = key if check != "python" else check
                shown = ", ".join(f"{value} on {node}" for node, value in said.items())
                wrong.append(f"{name} is {shown}")
    if wrong:
        mend = "install the same on all nodes: one environment on a shared disk, or one image"
        return failed("; ".join(dict.fromkeys(wrong)), mend, figures)
    return ok(f"the same on all {len(nodes)} nodes")


def judge_rates(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Yield a warning for each node that is far below the median of all in some rate."""
    slow: dict[str, list[str]] = {}
    figures: dict[str, dict[str, Any]] = {}
    for check, rows in RATES.items():
        for key, unit in rows:
            said = {n.name: v for n in nodes if (v := _figure(n, check, key)) is not None}
            usual = median(said.values()) if said else 0.0
            for name, value in said.items():
                if value < (DISK_APART if check == "disk speed" else APART) * usual:
                    text = f"{value:,.0f} {unit}, the median is {usual:,.0f}"
                    slow.setdefault(name, []).append(text)
                    figures.setdefault(name, {})[f"{check} {key}"] = [value, usual]
    for name, texts in slow.items():
        yield warning(
            f"{name} is slow: {'; '.join(texts)}",
            f"look for other programs, heat or a slow disk on {name}, or leave it out: every step "
            "waits for the slowest rank",
            {"node": name, "rates": figures[name]},
        )
    if not slow:
        yield ok(f"no node is more than {1 - APART:.0%} below the median")


def _figure(node: Node, check: str, key: str) -> Any:
    """A figure of a node's check; of several GPUs, the lowest."""
    found = [
        finding.figures[key]
        for finding in node.findings
        if (finding.name == check or finding.name.startswith(f"{check} "))
        and finding.figures.get(key) is not None
    ]
    return min(found) if found else None


def judge_clocks(said: Sequence[tuple[str, float]]) -> Finding:
    """Judge the clocks of (host, seconds) of each rank, read at the same moment."""
    usual = median(now for _, now in said)
    apart = {host: now - usual for host, now in said}
    worst = max(apart, key=lambda host: abs(apart[host]))
    figures = {"seconds": {host: round(value, 3) for host, value in apart.items()}}
    if abs(apart[worst]) > CLOCKS:
        side = "ahead of" if apart[worst] > 0 else "behind"
        return warning(
            f"the clock of {worst} is {abs(apart[worst]):.1f} s {side} the others",
            f"start its time service on {worst} (`timedatectl set-ntp true`, or chrony)",
            figures,
        )
    return ok(f"within {max(map(abs, apart.values())):.2f} s of each other", figures)


def judge_folder(said: Sequence[tuple[str, bool, bool]]) -> Finding:
    """Judge whether every node sees the run folder of the first, and is kept out by its lock."""
    blind = list(dict.fromkeys(host for host, sees, _ in said if not sees))
    free = list(dict.fromkeys(host for host, _, kept_out in said if not kept_out))
    if blind:
        return failed(
            f"{', '.join(blind)} does not see what {said[0][0]} writes there",
            "put it on a file system that all nodes share: --checkpoint-dir",
            {"blind": blind},
        )
    if free:
        return warning(
            f"a lock of {said[0][0]} does not keep {', '.join(free)} out",
            "mount it with locks (NFS: nolock off; Lustre: -o flock), and until then never start "
            "a run twice",
            {"unlocked": free},
        )
    return ok("all ranks see it, and its locks hold")


def judge_all_reduce(backend: str, rate: float, count: int, link_gb_s: float) -> Finding:
    """Judge the bus bandwidth over all ranks against the speed of the network's slowest card."""
    shown = f"{rate:.2f} GB/s over all {count} ranks by {backend}"
    shown += f" (the network has {link_gb_s:.2f} GB/s)" if link_gb_s else ""
    figures = {"bus_gb_s": round(rate, 3), "ranks": count, "link_gb_s": link_gb_s or None}
    if backend == "gloo" and rate < SHARE_OF_LINK * link_gb_s:
        return warning(
            shown,
            "see that GLOO_SOCKET_IFNAME names the fast interface on all nodes, and nobody else "
            "uses the network",
            figures,
        )
    if backend == "nccl" and rate < SHARE_OF_LINK * link_gb_s:
        return warning(
            shown,
            "see with NCCL_DEBUG=INFO which interface it takes; NCCL_SOCKET_IFNAME and NCCL_IB_HCA "
            "name the fast one",
            figures,
        )
    return ok(shown, figures)


def judge_nccl_failure(reasons: Sequence[str], hosts: Sequence[str]) -> Finding | None:
    """Name the ranks whose GPUs could not sum, with what NCCL says; None if all could.

    Of those that say the same, the first.
    """
    said: dict[str, str] = {}
    for rank, reason in enumerate(reasons):
        if reason:
            said.setdefault(reason, f"rank {rank} on {hosts[rank]}: {reason}")
    if not said:
        return None
    return failed(
        "; ".join(said.values()),
        "NCCL_DEBUG=INFO says where it stops; NCCL_SOCKET_IFNAME names the network that the "
        "machines share, and NCCL_IB_DISABLE=1 leaves InfiniBand out",
        {"ranks": [rank for rank, reason in enumerate(reasons) if reason]},
    )


def judge_loss(lost: Sequence[int], hosts: Sequence[str]) -> Finding:
    """Name the ranks that were lost while all were examined, with their hosts."""
    finding = failed(
        f"lost during the examination: {', '.join(f'rank {r} on {hosts[r]}' for r in lost)}",
        LOST,
        {"ranks": list(lost), "hosts": list(dict.fromkeys(hosts[rank] for rank in lost))},
    )
    return shared(finding, "meeting", PEERS)


def shared(finding: Finding, name: str, code: int = 0) -> Finding:
    return replace(finding, name=name, group="together", code=finding.code or code)
