"""`dtt doctor` as a user meets it, with all of its checks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtt.doctor.examination import CHECKS
from dtt.machine import free_port

pytestmark = [pytest.mark.processes, pytest.mark.thorough]
PAGE = Path(__file__).parents[2] / "docs" / "doctor.md"


def doctor(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "MASTER_PORT": str(free_port())}
    return subprocess.run(
        [sys.executable, "-m", "dtt", "doctor", *words],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_this_machine_is_examined(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--json")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    document = json.loads(done.stdout)
    assert document["fit"] is True
    (node,) = document["nodes"]
    found = {check["name"]: check for check in node["checks"]}
    assert {check.name for check in CHECKS} - {"GPUs"} <= found.keys()
    measured = ("matmul", "copy", "all-reduce", "disk speed", "one rank", "two ranks")
    assert all(found[name]["figures"] for name in measured)
    assert found["two ranks"]["figures"]["same"] is True
    assert all(check["mend"] for check in node["checks"] if check["status"] == "warning")
    assert not list(tmp_path.iterdir())


def test_settings_that_do_not_load_are_a_finding_among_others(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model:\n  dim: 100\n  heads: 6\n")
    done = doctor(tmp_path, "-c", "run.yaml", "--quick")
    assert done.returncode == 2
    assert "  failed   configuration   run.yaml:1: model: dim (100) must be" in done.stdout
    assert "not measured with --quick" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("not fit to train: configuration (exit code 2)")
    assert done.stderr == ""


def test_an_unknown_option_is_a_usage_error(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--quik")
    assert done.returncode == 2
    assert done.stderr.startswith("dtt doctor: error: unknown option --quik, did you mean --quick?")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_every_check_is_documented(check: object) -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:3] == "| *"]
    assert sum(row.startswith(f"| **{check.name}** |") for row in rows) == 1  # type: ignore[attr-defined]
