"""Samples of the machine, taken in the background."""

from __future__ import annotations

import threading

import pytest

from dtt.metrics.resources import Resources, gpu_sample, machine_sample


def test_means_since_the_last_reading() -> None:
    values = [1.0, 3.0, 8.0]

    def sample() -> dict[str, float]:
        return {"x": values.pop()}  # the fourth time is an error, which ends it

    def broken() -> dict[str, float]:
        raise RuntimeError("the driver went away")

    found = Resources({"good": sample, "bad": broken}, every=0.01)
    for thread in threading.enumerate():
        if thread.name in ("dtt-good", "dtt-bad"):
            thread.join(60)  # ended by an error, which reaches nobody
    assert found.read() == {"x": 4.0}
    assert found.read() == {}
    found.close()


def test_a_machine_has_these_figures() -> None:
    pytest.importorskip("psutil")
    found = machine_sample()()
    assert {"cpu_percent", "process_cpu_percent", "memory_used", "process_memory"} <= set(found)
    assert found["process_memory"] > 1e7 and 0 <= found["cpu_percent"] <= 100
    assert all(value >= 0 for value in found.values())


def test_without_gpus_there_is_nothing_to_sample() -> None:
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert gpu_sample() is None
    else:
        sample = gpu_sample()
        assert sample is not None and any(name.startswith("gpu_watts") for name in sample())
