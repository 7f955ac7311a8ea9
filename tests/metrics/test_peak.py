"""What devices could compute: by their names, and measured where the name says nothing."""

from __future__ import annotations

import pytest
import torch

from dtt.metrics import peak
from dtt.metrics.peak import PUBLISHED, Peak, find_peak, measure, measure_again, published

HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA GeForce RTX 3090", 71),
        ("AMD Instinct MI300X", 1307.4),
        ("AMD Instinct MI250X / MI250", 191.5),
    ],
)
def test_names_as_drivers_give_them(name: str, teraflops: float) -> None:
    assert published(name, HALF) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A10G",
        "NVIDIA H20",
        "Tesla V100-FHHL-16GB",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA RTX A1000",
        "NVIDIA GeForce GTX 1080",
        "Some GPU of tomorrow",
        "",
    ],
)
def test_other_chips_are_not_known(name: str) -> None:
    assert published(name, HALF) is None


def test_the_arithmetic_counts() -> None:
    name = "NVIDIA A100-SXM4-80GB"
    assert published(name, FULL) == pytest.approx(19.5e12)
    assert published(name, FULL, tf32=True) == pytest.approx(156e12)
    assert published("Tesla V100-SXM2-16GB", torch.float16) == pytest.approx(125e12)
    assert published("Tesla V100-SXM2-16GB", HALF) is None  # it has none
    assert published("Tesla T4", FULL, tf32=True) == pytest.approx(8.1e12)  # nor that
    assert published(name, torch.float64) is None


def test_rates_are_dense() -> None:
    """With sparsity they would be twice as high; tf32 is half of half precision in all of them."""
    for name, rates in PUBLISHED.items():
        if rates.tf32 is not None:
            assert rates.fp16 / rates.tf32 == pytest.approx(2, rel=0.03), name
        assert rates.fp32 < rates.fp16, name


def test_an_unknown_device_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    find_peak.cache_clear()
    asked: list[torch.dtype] = []

    def fake(device: torch.device, dtype: torch.dtype) -> float:
        asked.append(dtype)
        return 3e9

    monkeypatch.setattr(peak, "measure", fake)
    cpu = torch.device("cpu")
    assert [find_peak(cpu, FULL) for _ in range(3)] == [Peak(3e9, "measured")] * 3
    assert find_peak(cpu, HALF) == Peak(3e9, "measured")
    assert asked == [FULL, HALF]
    find_peak.cache_clear()


def test_a_known_gpu_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    find_peak.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S")
    assert find_peak(torch.device("cuda", 0), HALF) == Peak(362e12, "published")
    find_peak.cache_clear()


def test_the_best_product_counts() -> None:
    """Products of 512^3 and 1024^3, by a clock on which they take 2, 4, 1 and 16 seconds."""
    times = iter([0, 0, 0, 2, 2, 6, 6, 6, 7, 7, 23, 23])
    found = measure(torch.device("cpu"), FULL, 6.5, lambda: next(times))
    assert found == 2 * 1024**3 / 4


def test_a_peak_is_measured_again_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "measure", lambda device, dtype: 5e9)
    cpu = torch.device("cpu")
    assert measure_again(cpu, FULL, Peak(3e9, "measured")) == Peak(5e9, "measured")
    assert measure_again(cpu, FULL, Peak(9e9, "measured")) == Peak(9e9, "measured")
    assert measure_again(cpu, FULL, Peak(3e9, "published")) == Peak(3e9, "published")


def test_what_a_run_leaves_no_memory_to_measure_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: torch.device, dtype: torch.dtype) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def wrong(device: torch.device, dtype: torch.dtype) -> float:
        raise ValueError("something else")

    cpu, known = torch.device("cpu"), Peak(3e9, "measured")
    monkeypatch.setattr(peak, "measure", full)
    assert measure_again(cpu, FULL, known) == known
    monkeypatch.setattr(peak, "measure", wrong)
    with pytest.raises(ValueError, match="something else"):
        measure_again(cpu, FULL, known)
