"""What the machine does meanwhile: CPU, memory, disk, network, GPUs, sampled in the background."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dtt.errors import ConfigError
from dtt.machine import is_installed

EVERY = 2.0
"""Seconds between samples."""

Sample = Callable[[], dict[str, float]]
Make = Callable[[], Sample | None]
"""Gets a source of samples ready; None: this machine has none of these figures."""


class Resources:
    """Means since the last reading of what sources find, each made and called in its own thread.

    A source that fails is left out from then on, and one that blocks blocks only its own figures.
    """

    def __init__(self, sources: dict[str, Make], every: float = EVERY) -> None:
        self._every, self._lock, self._stop = every, threading.Lock(), threading.Event()
        self._sums: dict[str, tuple[float, int]] = {}
        for name, make in sources.items():
            thread = threading.Thread(
                target=self._watch, args=(make,), name=f"dtt-{name}", daemon=True
            )
            thread.start()

    def read(self) -> dict[str, float]:
        """Return the mean of each figure since the last reading; none where there is no sample."""
        with self._lock:
            sums, self._sums = self._sums, {}
        return {name: total / count for name, (total, count) in sums.items()}

    def close(self) -> None:
        """Take no more samples; nothing is waited for."""
        self._stop.set()

    def _watch(self, make: Make) -> None:
        with suppress(Exception):  # a driver that was reset, a process that may not look
            sample = make()
            while sample is not None and not self._stop.wait(self._every):
                found = sample()
                with self._lock:
                    for name, value in found.items():
                        total, count = self._sums.get(name, (0.0, 0))
                        self._sums[name] = total + value, count + 1


def require_resources() -> None:
    """Raise ConfigError where logging.resources cannot be had."""
    if not is_installed("psutil"):
        raise ConfigError(
            "logging.resources is on, but the package psutil is missing",
            "pip install 'dtt[monitor]', or leave it off",
        )


def watch_machine() -> Resources:
    """Sample this machine and, where NVIDIA's library sees any, its GPUs."""
    return Resources({"machine": machine_sample, "gpus": gpu_sample})


def machine_sample() -> Sample:
    """Return what samples CPU (percent of all cores; of this process, of one), memory in use in
    bytes (this process's is resident), and bytes per second of disks and network."""
    import psutil

    def counts() -> tuple[float, Any, Any]:
        disk, net = _counted(psutil.disk_io_counters), _counted(psutil.net_io_counters)
        return time.monotonic(), disk, net

    process = psutil.Process(os.getpid())
    process.cpu_percent(), psutil.cpu_percent()  # the first call only starts the count
    before = [counts()]

    def sample() -> dict[str, float]:
        (then, old_disk, old_net), (now, disk, net) = before[0], counts()
        before[0] = now, disk, net
        seconds = max(now - then, 1e-9)
        found = {
            "cpu_percent": psutil.cpu_percent(),
            "process_cpu_percent": process.cpu_percent(),
            "memory_used": float(psutil.virtual_memory().used),
            "process_memory": float(process.memory_info().rss),
        }
        if disk is not None and old_disk is not None:
            found["disk_read_per_second"] = (disk.read_bytes - old_disk.read_bytes) / seconds
            found["disk_written_per_second"] = (disk.write_bytes - old_disk.write_bytes) / seconds
        if net is not None and old_net is not None:
            found["network_received_per_second"] = (net.bytes_recv - old_net.bytes_recv) / seconds
            found["network_sent_per_second"] = (net.bytes_sent - old_net.bytes_sent) / seconds
        return found

    return sample


def _counted(read: Callable[[], Any]) -> Any:
    """Return what psutil counts; None where the system does not show it, as in some containers."""
    try:
        return read()
    except (NotImplementedError, OSError):
        return None


def gpu_sample() -> Sample | None:
    """Return what samples load (percent), memory (bytes) and power (watts) of each NVIDIA GPU of
    this machine, as far as it has these; None where there is none, or no library to ask."""
    if not is_installed("pynvml"):
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return None
    figures: dict[str, Callable[[Any], float]] = {
        "gpu_percent": lambda handle: float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        "gpu_memory": lambda handle: float(pynvml.nvmlDeviceGetMemoryInfo(handle).used),
        "gpu_watts": lambda handle: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }

    def sample() -> dict[str, float]:
        found = {}
        for index, handle in enumerate(handles):
            for name, read in figures.items():
                with suppress(pynvml.NVMLError):  # not every GPU has each of them
                    found[f"{name}/{index}"] = read(handle)
        return found

    return sample if handles else None
