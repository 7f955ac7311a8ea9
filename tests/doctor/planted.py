"""`dtt doctor` with few checks, where the second node (by torchrun's GROUP_RANK) is slow, or dies
during its examination: `python planted.py slow|dies [OPTIONS]`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from dtt.cli import main
from dtt.doctor import examination, processor
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


if __name__ == "__main__":
    kept = [check for check in examination.CHECKS if check.name in FEW]
    matmul = examination.Check("matmul", "machine", 2, planted_rate)
    examination.CHECKS = (*kept[:2], matmul, *kept[2:])
    sys.exit(main(["doctor", *sys.argv[2:]]))
