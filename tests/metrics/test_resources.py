"""Samples of the machine, taken in the background."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from dtt.metrics.resources import Resources, Sample, gpu_sample, machine_sample


def test_means_since_the_last_reading() -> None:
    values = [1.0, 3.0, 8.0]

    def sample() -> dict[str, float]:
        return {"x": values.pop()}  # the fourth time is an error, which ends it

    def broken() -> dict[str, float]:
        raise RuntimeError("the driver went away")

    found = Resources({"good": lambda: sample, "bad": lambda: broken}, every=0.01)
    for thread in threading.enumerate():
        if thread.name in ("dtt-good", "dtt-bad"):
            thread.join(60)  # ended by an error, which reaches nobody
    assert found.read() == {"x": 4.0}
    assert found.read() == {}
    found.close()


def test_sources_that_cannot_begin_keep_nobody() -> None:
    hanging, sampled = threading.Event(), threading.Event()

    def hang() -> Sample:
        hanging.wait(60)
        raise AssertionError("is never asked for a sample")

    def refuse() -> Sample:
        raise NotImplementedError("no such counters here")

    def sample() -> dict[str, float]:
        sampled.set()
        return {"x": 1.0}

    sources = {"hang": hang, "refuse": refuse, "none": lambda: None, "good": lambda: sample}
    found = Resources(sources, every=0.01)
    assert sampled.wait(60)
    found.close()
    for thread in threading.enumerate():
        if thread.name == "dtt-good":
            thread.join(60)
    assert found.read() == {"x": 1.0}
    hanging.set()


def test_a_machine_has_these_figures() -> None:
    pytest.importorskip("psutil")
    found = machine_sample()()
    assert {"cpu_percent", "process_cpu_percent", "memory_used", "process_memory"} <= set(found)
    assert found["process_memory"] > 1e7 and 0 <= found["cpu_percent"] <= 100
    assert all(value >= 0 for value in found.values())


def test_a_machine_without_counts_of_disks_has_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    psutil = pytest.importorskip("psutil")

    def none_here(*given: Any) -> Any:
        raise NotImplementedError("neither /proc/diskstats nor /sys/block")

    monkeypatch.setattr(psutil, "disk_io_counters", none_here)
    found = machine_sample()()
    assert "disk_read_per_second" not in found and "cpu_percent" in found


def test_without_gpus_there_is_nothing_to_sample() -> None:
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert gpu_sample() is None
    else:
        sample = gpu_sample()
        assert sample is not None and any(name.startswith("gpu_") for name in sample())


def test_a_gpu_without_one_figure_has_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's library as it answers for two GPUs, of which the first does not tell its power."""
    pynvml = pytest.importorskip("pynvml")

    class Told:
        gpu, used = 50, 1024

    def power(handle: int) -> int:
        if handle == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 70_000

    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUtilizationRates": lambda handle: Told,
        "nvmlDeviceGetMemoryInfo": lambda handle: Told,
        "nvmlDeviceGetPowerUsage": power,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    sample = gpu_sample()
    assert sample is not None
    both = {"gpu_percent/0": 50, "gpu_percent/1": 50, "gpu_memory/0": 1024, "gpu_memory/1": 1024}
    assert sample() == {**both, "gpu_watts/1": 70.0}
