"""`dtt doctor` with few checks, where the second node (by torchrun's GROUP_RANK) is slow, dies
during its examination, or leaves while all work together; or where both say that they have a GPU:
`python planted.py slow|dies|leaves|gpus [OPTIONS]`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from dtt.cli import main
from dtt.doctor import examination, network, processor
from dtt.doctor.finding import Finding, Subject, ok

FEW = ("python", "packages", "files")
SECOND = os.environ.get("GROUP_RANK", os.environ.get("RANK")) == "1"


def planted_rate(subject: Subject) -> Any:
    """A rate as the machine would have it if nothing else ran on it."""
    if SECOND and sys.argv[1] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    rate = 100.0 if SECOND and sys.argv[1] == "slow" else 300.0
    figures = {"fp32_gflops": rate, "bf16_gflops": 900.0, "bf16_is_native": True, "threads": 1}
    finding: Finding = processor.judge_matmul(figures)
    assert finding.status == ok("").status
    yield finding


def planted_speed(interface: str) -> float:
    """What is asked in the midst of collectives."""
    if SECOND:
        os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


if __name__ == "__main__":
    if sys.argv[1] == "leaves":
        network.speed_of = planted_speed
    if sys.argv[1] == "gpus":
        torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    kept = [check for check in examination.CHECKS if check.name in FEW]
    matmul = examination.Check("matmul", "machine", 2, planted_rate)
    examination.CHECKS = (*kept[:2], matmul, *kept[2:])
    sys.exit(main(["doctor", *sys.argv[2:]]))
