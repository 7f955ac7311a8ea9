"""Links between ranks: what an all-reduce carries, against what the link below it should."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

from dtt.doctor.bench import UnmeasuredError, ended, short
from dtt.doctor.finding import Finding, Subject, ok, warning
from dtt.doctor.gpu import nvidia_smi
from dtt.machine import free_port

SIZE = 64 << 20
"""Bytes that are summed: large enough that the link counts, and not the start."""
TIMES = 4
SHARE_OF_LOOPBACK = 0.2
"""gloo on one machine copies through a socket, adds, and copies back: a third of a plain stream is
usual, below this share something else is wrong."""
SHARE_OF_LINK = 0.4
"""Of a network card, NVLink or PCIe."""
PCIE = 12.0
"""GB/s that PCIe 3.0 x16 gives, the least that GPUs without NVLink should have between them."""


def check_all_reduce(subject: Subject) -> Iterator[Finding]:
    gpus = subject.gpus
    if len(gpus) > 1:
        rate = subject.bench.run(measure, "nccl", len(gpus), seconds=60)
        nvlink = gpus[0].get("published_link_gb_s") or 0.0
        has_nvlink = shows_nvlink(nvidia_smi("topo", "-m"))
        yield judge_nccl(rate, len(gpus), nvlink, has_nvlink)
        return
    rate = subject.bench.run(measure, "gloo", 2, seconds=30)
    yield judge_gloo(rate, subject.bench.run(measure_stream))


def judge_gloo(rate: float, stream: float) -> Finding:
    """Judge the bus bandwidth of two local ranks against one plain stream over loopback, GB/s."""
    shown = (
        f"{rate:.2f} GB/s between 2 ranks over gloo (a plain local stream has {stream:.1f} GB/s)"
    )
    figures = {
        "bus_gb_s": round(rate, 3),
        "stream_gb_s": round(stream, 3),
        "ranks": 2,
        "backend": "gloo",
    }
    if rate < SHARE_OF_LOOPBACK * stream:
        return warning(
            shown,
            "free the cores of other programs; if GLOO_SOCKET_IFNAME is set, unset it for ranks of "
            "one machine",
            figures,
        )
    return ok(shown, figures)


def judge_nccl(rate: float, ranks: int, nvlink: float, has_nvlink: bool) -> Finding:
    """Judge the bus bandwidth of this machine's GPUs, GB/s."""
    link, limit = ("NVLink", nvlink) if has_nvlink and nvlink else ("PCIe", PCIE)
    shown = f"{rate:.0f} GB/s between {ranks} GPUs over NCCL ({link} has {limit:.0f} GB/s)"
    figures = {"bus_gb_s": round(rate, 2), "ranks": ranks, "backend": "nccl", "link_gb_s": limit}
    if rate < SHARE_OF_LINK * limit:
        return warning(
            shown,
            "run once with NCCL_DEBUG=INFO and see which way it takes (SHM or P2P is right, NET "
            "within one machine is not); unset NCCL_P2P_DISABLE and NCCL_SHM_DISABLE",
            figures,
        )
    return ok(shown, figures)


def measure(backend: str, ranks: int) -> float:
    """Return the bus bandwidth, GB/s, of an all-reduce between local ranks.

    That is 2 (n - 1) / n times the bytes by the time: what each link carries, for any number of
    ranks (nccl-tests, PERFORMANCE.md). UnmeasuredError: what the first rank that failed said. The
    others end with this process, or at their time limit.
    """
    method = "fork" if sys.platform == "linux" else "spawn"
    port, context = free_port(), cast(Any, multiprocessing.get_context(method))
    receiving, sending = context.Pipe(duplex=False)
    given = [(backend, rank, ranks, port, sending) for rank in range(ranks)]
    processes = [context.Process(target=_rank, args=each) for each in given]
    for process in processes:
        process.start()
    sending.close()
    try:
        said = receiving.recv()
    except EOFError:  # all have died without a word
        said = ""
    if isinstance(said, str):
        raise UnmeasuredError(said or f"rank 0: {_death(processes[0])}")
    for process in processes:
        process.join()
    return float(said)


def _death(process: Any) -> str:
    process.join()
    return ended(process.exitcode)


def _rank(backend: str, rank: int, ranks: int, port: int, sending: Any) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    address = f"tcp://127.0.0.1:{port}"
    limit = timedelta(seconds=25)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend, init_method=address, rank=rank, world_size=ranks, timeout=limit
        )
        rate = bus_bandwidth(device, ranks)
        if rank == 0:
            sending.send(rate)
        dist.barrier()
    except Exception as error:  # whatever it is, the report says it
        sending.send(f"rank {rank}: {type(error).__name__}: {short(str(error))}")
        os._exit(1)
    os._exit(0)


def bus_bandwidth(device: Any, ranks: int, size: int = SIZE, group: Any = None) -> float:
    """Return the bus bandwidth of the quickest of some all-reduces, GB/s, as this rank sees it."""
    import torch
    import torch.distributed as dist

    values, seconds = torch.zeros(size // 4, device=device), float("inf")
    for turn in range(TIMES + 1):
        dist.barrier(group)
        start = time.perf_counter()
        dist.all_reduce(values, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn:  # the first one makes the connections
            seconds = min(seconds, time.perf_counter() - start)
    return 2 * (ranks - 1) / ranks * size / seconds / 1e9


def measure_stream() -> float:
    """Return GB/s of a plain stream between two threads of this machine over loopback."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(10)
    block = memoryview(bytearray(1 << 20))

    def receive() -> None:
        with listener.accept()[0] as end:
            buffer = bytearray(1 << 20)
            while end.recv_into(buffer):
                pass

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    start, sent = time.perf_counter(), 0
    with socket.create_connection(listener.getsockname()) as end:
        while sent < 4 * SIZE:
            end.sendall(block)
            sent += len(block)
    thread.join()
    listener.close()
    return sent / (time.perf_counter() - start) / 1e9


def shows_nvlink(matrix: str) -> bool:
    """Whether a GPU reaches another by NVLink in the matrix of `nvidia-smi topo -m`."""
    rows = [line.split() for line in matrix.splitlines() if line.startswith("GPU")]
    return any(cell.startswith("NV") and cell[2:].isdecimal() for row in rows for cell in row)
