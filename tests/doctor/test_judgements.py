"""What figures mean: each judgement with figures on both sides of its threshold."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from dtt.doctor import disk, gpu, hub, limits, link, network, processor, settings, software, trial
from dtt.doctor.comparison import judge_nccl_failure
from dtt.doctor.finding import Finding

H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "memory_total_gb": 85.0,
    "memory_free_gb": 84.4,
    "capability": "9.0",
    "uuid": "GPU-1",
    "matmul_tflops": 720.0,
    "copy_gb_s": 2900.0,
    "to_gpu_gb_s": 55.0,
    "to_host_gb_s": 52.0,
    "published_matmul_tflops": 989.4,
    "published_copy_gb_s": 3350,
    "published_link_gb_s": 450,
}
BUILD = {
    "torch": "2.13.0+cu130",
    "cuda": "13.0",
    "nccl": "2.28.3",
    "cudnn": 91300,
    "gpus": 8,
    "reason": "",
    "cpu": "AVX512",
    "gloo": True,
    "driver": "580.82",
    "gpus_of_machine": 8,
}
SMI = """\
NVIDIA H100 80GB HBM3, 580.82.07, 81559, 0, GPU-aa
Tesla T4, 580.82.07, 15360, [N/A], GPU-bb
"""
TOPOLOGY = """\
        GPU0    GPU1    NIC0    CPU Affinity    NUMA Affinity
GPU0     X      {link}     PIX     0-63            0
GPU1    {link}      X      SYS     0-63            0
NIC0    PIX     SYS      X
"""


def gpu_finding(**changes: Any) -> Finding:
    return gpu.judge(0, {**H100, **changes}, [{**H100, **changes}])


def gloo(rate: float) -> Finding:
    return link.judge_gloo(rate, 4.0)


def losses(first: float, norm: float = 0.5) -> Finding:
    about = {"device": "cpu", "precision": "fp32", "vocabulary": 509}
    return trial.judge_losses({**about, "losses": [first, 6.2], "norms": [norm, 0.5]})


def speed(write: float) -> Finding:
    return disk.judge_speed(Path("runs"), {"write_mb_s": write, "read_mb_s": 900.0}, 0)


def matmul(bf16: float, native: bool) -> Finding:
    figures = {"fp32_gflops": 100.0, "bf16_gflops": bf16, "bf16_is_native": native, "threads": 2}
    return processor.judge_matmul(figures)


CASES = {
    "old Python": (lambda: software.judge_python((3, 9, 1)), "failed", "3.10"),
    "Python": (lambda: software.judge_python((3, 10, 0)), "ok", ""),
    "old torch": (
        lambda: software.judge_packages({"torch": ">=2.11"}, {"torch": "2.10.1+cu128"}),
        "failed",
        "pip install 'torch>=2.11'",
    ),
    "new rich": (
        lambda: software.judge_packages({"rich": ">=13,<16"}, {"rich": "16.0.0"}),
        "failed",
        "'rich>=13,<16'",
    ),
    "missing package": (
        lambda: software.judge_packages({"numpy": ">=1.26"}, {"numpy": None}),
        "failed",
        "'numpy>=1.26'",
    ),
    "packages": (
        lambda: software.judge_packages({"torch": ">=2.11"}, {"torch": "2.13.0+cpu"}),
        "ok",
        "",
    ),
    "extra not used": (lambda: software.judge_extras({"wandb": ["wandb"]}, set()), "ok", ""),
    "extra used": (
        lambda: software.judge_extras({"wandb": ["wandb"]}, {"wandb"}),
        "failed",
        "pip install 'dtt[wandb]'",
    ),
    "CPU build beside a GPU": (
        lambda: software.judge_pytorch({**BUILD, "cuda": None, "gpus": 0}),
        "warning",
        "CUDA build",
    ),
    "driver too old": (
        lambda: software.judge_pytorch({**BUILD, "gpus": 0, "reason": "driver too old"}),
        "failed",
        "update the driver",
    ),
    "no NCCL": (lambda: software.judge_pytorch({**BUILD, "nccl": None}), "failed", "official"),
    "PyTorch": (lambda: software.judge_pytorch(BUILD), "ok", ""),
    "busy": (lambda: processor.judge_cores(8, 8, 2.1), "warning", "end them"),
    "not busy": (lambda: processor.judge_cores(8, 8, 1.9), "ok", ""),
    "little memory": (lambda: processor.judge_memory(1.9e9, 64e9), "warning", "--mem"),
    "enough memory": (lambda: processor.judge_memory(2.1e9, 64e9), "ok", ""),
    "memory unknown": (lambda: processor.judge_memory(0, 0), "skipped", ""),
    "slow native bf16": (lambda: matmul(90, True), "warning", "--precision fp32"),
    "slow bf16 that is not chosen": (lambda: matmul(90, False), "ok", ""),
    "GPU": (gpu_finding, "ok", ""),
    "slow GPU": (lambda: gpu_finding(matmul_tflops=989.4 * 0.54), "warning", "nvidia-smi -q"),
    "slow memory of a GPU": (lambda: gpu_finding(copy_gb_s=1500.0), "warning", "nvidia-smi -q"),
    "slow bus of a GPU": (lambda: gpu_finding(to_gpu_gb_s=3.0), "warning", "PCIE"),
    "GPU in use": (lambda: gpu_finding(processes=[4711]), "warning", "CUDA_VISIBLE_DEVICES"),
    "GPU memory in use": (lambda: gpu_finding(memory_free_gb=70.0), "warning", "end them"),
    "GPU with errors": (lambda: gpu_finding(ecc_errors=3), "failed", "replaced"),
    "gloo": (lambda: gloo(1.3), "ok", ""),
    "slow gloo": (lambda: gloo(0.7), "warning", "GLOO_SOCKET_IFNAME"),
    "NVLink": (lambda: link.judge_nccl(360, 8, 450, True), "ok", ""),
    "NVLink that is not used": (lambda: link.judge_nccl(20, 8, 450, True), "warning", "NCCL_DEBUG"),
    "PCIe": (lambda: link.judge_nccl(9, 2, 450, False), "ok", ""),
    "shared memory of Docker": (
        lambda: limits.judge_shared_memory(64e6, 64e6),
        "warning",
        "--shm-size",
    ),
    "full shared memory": (lambda: limits.judge_shared_memory(1e6, 64e6), "failed", "--shm-size"),
    "shared memory": (lambda: limits.judge_shared_memory(1e9, 1e9), "ok", ""),
    "few files": (lambda: limits.judge_open_files(1000, 4096), "warning", "ulimit -n 4096"),
    "too few files": (lambda: limits.judge_open_files(200, 200), "failed", "limits.conf"),
    "files": (lambda: limits.judge_open_files(1024, 4096), "ok", ""),
    "locked without InfiniBand": (lambda: limits.judge_locked_memory(65536, []), "ok", ""),
    "locked": (lambda: limits.judge_locked_memory(65536, ["mlx5_0"]), "warning", "ulimit -l"),
    "all may be locked": (
        lambda: limits.judge_locked_memory(resource.RLIM_INFINITY, ["mlx5_0"]),
        "ok",
        "",
    ),
    "no name": (lambda: network.judge_host_name("n1", [], False), "warning", "/etc/hosts"),
    "no name among several": (lambda: network.judge_host_name("n1", [], True), "failed", "hosts"),
    "local name": (lambda: network.judge_host_name("n1", ["127.0.1.1"], False), "ok", ""),
    "local name among several": (
        lambda: network.judge_host_name("n1", ["127.0.1.1"], True),
        "warning",
        "GLOO_SOCKET_IFNAME",
    ),
    "name": (lambda: network.judge_host_name("n1", ["10.0.0.1"], True), "ok", ""),
    "default port taken": (
        lambda: network.judge_port(29500, "address already in use", "python (process 7)", False),
        "warning",
        "MASTER_PORT",
    ),
    "no renames": (
        lambda: disk.judge_files(Path("runs"), {"renames": False, "locks": True}),
        "failed",
        "--checkpoint-dir",
    ),
    "no locks": (
        lambda: disk.judge_files(Path("runs"), {"renames": True, "locks": False}),
        "warning",
        "nolock",
    ),
    "slow disk": (lambda: speed(49), "warning", "checkpoint.every"),
    "disk": (lambda: speed(51), "ok", ""),
    # 1e9 parameters x 16 bytes x 3 checkpoints = 48 GB
    "full disk": (lambda: disk.judge_space(Path("/d"), 47e9, 10**9, 2), "failed", "keep"),
    "disk that gets full": (
        lambda: disk.judge_space(Path("/d"), 71e9, 10**9, 2),
        "warning",
        "keep",
    ),
    "room": (lambda: disk.judge_space(Path("/d"), 73e9, 10**9, 2), "ok", ""),
    "model too large": (
        lambda: settings.judge_model(10**9, 20e9, 16e9, "GPU memory"),
        "failed",
        "--parallel.shard",
    ),
    "model tight": (lambda: settings.judge_model(10**9, 14e9, 16e9, "memory"), "warning", "micro"),
    "model": (lambda: settings.judge_model(10**9, 12e9, 16e9, "memory"), "ok", ""),
    "no Hub": (
        lambda: hub.judge_hub(hub.HUB, False, "timed out", (Path("c"), 0)),
        "warning",
        "HF_ENDPOINT",
    ),
    "offline": (lambda: hub.judge_hub(hub.HUB, True, "", (Path("c"), 3)), "skipped", ""),
    "Hub": (lambda: hub.judge_hub(hub.HUB, False, "", (Path("c"), 3)), "ok", ""),
    "no compiler": (lambda: trial.judge_compiler(None, 0.0, False), "warning", "apt install g++"),
    "no compiler with --compile": (lambda: trial.judge_compiler(None, 0.0, True), "failed", "g++"),
    "loss": (lambda: losses(6.23), "ok", ""),
    "wrong loss": (lambda: losses(7.9), "failed", "computes wrongly"),
    "loss not a number": (lambda: losses(float("nan")), "failed", "--precision fp32"),
    "gradient not finite": (lambda: losses(6.23, float("inf")), "failed", "--precision fp32"),
}


@pytest.mark.parametrize("name", CASES)
def test_figures_are_judged(name: str) -> None:
    judge, status, mend = CASES[name]
    finding = judge()
    assert finding.status == status
    assert mend in finding.mend
    assert bool(finding.mend) == (status in ("warning", "failed"))
    assert "\n" not in finding.measured + finding.mend


def test_a_gpu_is_compared_with_its_data_sheet() -> None:
    assert "720 TFLOP/s (73% of the published 989)" in gpu_finding().measured
    slow = gpu_finding(matmul_tflops=490.0)
    assert "(50% of the published 989)" in slow.measured
    assert slow.measured.endswith("its matmul is slow")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", (989.4, 3350, 450)),
        ("NVIDIA H100 PCIe", (756.5, 2000, 0)),
        ("NVIDIA H100 NVL", (835.5, 3900, 300)),
        ("NVIDIA GH200 480GB", (989.4, 4000, 450)),
        ("NVIDIA A100-SXM4-80GB", (312, 2039, 300)),
        ("NVIDIA A100-SXM4-40GB", (312, 1555, 300)),
        ("NVIDIA A100 80GB PCIe", (312, 1935, 0)),
        ("NVIDIA L4", (121, 300, 0)),
        ("NVIDIA GeForce RTX 4090", (165.2, 1008, 0)),
        ("NVIDIA RTX A6000", (154.8, None, None)),
        # other chips than those that they are called after
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (None, None, None)),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", (None, None, None)),
    ],
)
def test_a_gpu_is_found_by_its_name(name: str, expected: tuple[float | None, ...]) -> None:
    found = gpu.published_rates(name, torch.bfloat16)
    assert tuple(found.values()) == expected


def test_a_gpu_without_bf16_is_compared_in_fp16() -> None:
    found = gpu.published_rates("Tesla V100-SXM2-16GB", torch.float16)
    assert found["published_matmul_tflops"] == 125


def test_an_unknown_gpu_is_compared_with_the_others_only() -> None:
    unknown = {**H100, "name": "NVIDIA X1", **gpu.published_rates("NVIDIA X1", torch.bfloat16)}
    rows = [{**unknown, "matmul_tflops": rate} for rate in (50.0, 50.0, 30.0)]
    found = [gpu.judge(index, row, rows) for index, row in enumerate(rows)]
    assert [finding.status for finding in found] == ["ok", "ok", "warning"]
    assert "its matmul is 40% below the other GPUs'" in found[2].measured
    assert found[2].name == "GPU 2"


def test_nvidia_smi_is_read() -> None:
    rows = gpu.parse_nvidia_smi(SMI, "GPU-aa, 812, 1024\nGPU-aa, 813, 512\n")
    assert [row["name"] for row in rows] == ["NVIDIA H100 80GB HBM3", "Tesla T4"]
    assert rows[0]["processes"] == [812, 813]
    assert rows[0]["driver"] == "580.82.07"
    assert [row["ecc_errors"] for row in rows] == [0, None]
    assert gpu.parse_nvidia_smi("", "") == []


def test_ranks_whose_gpus_fail_are_named_with_what_they_say() -> None:
    hosts = ["n1", "n1", "n2", "n2"]
    assert judge_nccl_failure(["", "", "", ""], hosts) is None
    finding = judge_nccl_failure(["", "timed out", "no route", "no route"], hosts)
    assert finding is not None and finding.status == "failed"
    assert finding.measured == "rank 1 on n1: timed out; rank 2 on n2: no route"
    assert finding.figures["ranks"] == [1, 2, 3]


def test_nvlink_is_seen_in_the_matrix() -> None:
    assert link.shows_nvlink(TOPOLOGY.format(link="NV18"))
    assert not link.shows_nvlink(TOPOLOGY.format(link="NODE"))


def test_prepared_data_is_whole_only_where_it_was_hashed() -> None:
    found = {"folder": "d", "prepared": True, "tokens": 7, "hashed": True}
    assert settings.shown_corpus(found) == "d: 7 training tokens, whole"
    assert "of the right sizes" in settings.shown_corpus({**found, "hashed": False})


def test_requirements_are_read_by_extra() -> None:
    lines = [
        "torch>=2.11",
        "rich<16,>=13",
        'fsspec[http]>=2024.6; extra == "data"',
        "backports.zstd<2,>=1; python_version < \"3.14\" and extra == 'data'",
        'dtt[data,plot]; extra == "all"',
    ]
    assert dict(software.needed(lines)) == {"torch": ">=2.11", "rich": "<16,>=13"}
    assert dict(software.needed(lines, "data")) == {"fsspec": ">=2024.6"}
    assert dict(software.needed(lines, "all")) == {}


@pytest.mark.parametrize(
    ("version", "bounds", "inside"),
    [
        ("2.11.0", ">=2.11", True),
        ("2.13.0a0+git1", ">=2.11", True),
        ("2.9.1", ">=2.11", False),
        ("16.0", ">=13,<16", False),
        ("15.9.9", "<16,>=13", True),
        ("1.0.0", ">=1", True),
    ],
)
def test_versions_are_compared_as_numbers(version: str, bounds: str, inside: bool) -> None:
    assert software.fits(version, bounds) is inside


@pytest.mark.parametrize(
    ("variable", "value", "status"),
    [
        ("GLOO_SOCKET_IFNAME", "ib9", "failed"),
        ("GLOO_SOCKET_IFNAME", "eth0", "ok"),
        ("NCCL_SOCKET_IFNAME", "eth", "ok"),
        ("NCCL_SOCKET_IFNAME", "=eth", "failed"),
        ("NCCL_SOCKET_IFNAME", "^lo", "ok"),
        ("GLOO_SOCKET_IFNAME", "down0", "failed"),
    ],
)
def test_an_interface_that_is_named_must_exist(
    variable: str, value: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "down0": []}
    monkeypatch.setattr("dtt.network.interfaces", lambda: there)
    finding = network.judge_interfaces(there, {variable: value})
    assert finding.status == status
    if status == "failed":
        assert f"export {variable}=eth0" in finding.mend
