"""Several machines, stood in for by several launches on this one: real torchrun, real mpirun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dtt.doctor import roll
from dtt.machine import free_port

pytestmark = [pytest.mark.processes, pytest.mark.thorough]
PLANTED = str(Path(__file__).with_name("planted.py"))
MPIRUN = shutil.which(
    "mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
)


def environ(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def torchruns(folder: Path, *words: str) -> list[subprocess.Popen[str]]:
    """Two launches of one rank each, as on two nodes."""
    port, started = str(free_port()), []
    for number in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command += ["--node-rank", str(number), "--nproc-per-node", "1"]
        command += ["--master-addr", "127.0.0.1", "--master-port", port, PLANTED, *words]
        started.append(
            subprocess.Popen(
                command,
                cwd=folder,
                env=environ(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    done = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=180)
            done.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return done


def together(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in document["together"]}


def test_a_slow_node_is_named_under_torchrun(tmp_path: Path) -> None:
    (code, out, err), (other, silent, _) = ended(torchruns(tmp_path, "slow", "--json"))
    assert (code, other, silent) == (0, 0, ""), err
    document = json.loads(out)
    first, second = (node["name"] for node in document["nodes"])
    assert (first, second) == (f"{os.uname().nodename}#1", f"{os.uname().nodename}#2")
    shared = together(document)
    assert shared["rates"]["status"] == "warning"
    assert shared["rates"]["measured"].startswith(f"{second} is slow: 100 GFLOP/s in fp32")
    assert {"versions", "clocks", "run folder", "all-reduce gloo"} <= shared.keys()
    assert all(shared[name]["status"] == "ok" for name in ("versions", "clocks", "run folder"))
    assert shared["all-reduce gloo"]["figures"]["bus_gb_s"] > 0
    assert not list(tmp_path.iterdir())


def test_a_node_that_dies_is_named(tmp_path: Path) -> None:
    (code, out, _), (other, _, _) = ended(torchruns(tmp_path, "dies", "--json"))
    assert code and other  # torchrun makes 1 of every code
    document = json.loads(out)
    assert document["exit_code"] == 7
    lost = together(document)["meeting"]
    assert lost["status"] == "failed"
    assert lost["figures"]["ranks"] == [1]
    (node,) = document["nodes"]
    assert {"python", "matmul"} <= {check["name"] for check in node["checks"]}


def test_a_node_that_dies_while_all_work_together_is_named(tmp_path: Path) -> None:
    (code, out, err), (other, _, _) = ended(torchruns(tmp_path, "leaves", "--json"))
    assert code and other
    document = json.loads(out)
    assert document["exit_code"] == 7, err
    lost = together(document)["meeting"]
    assert (lost["status"], lost["figures"]["ranks"]) == ("failed", [1])
    (first, second) = document["nodes"]
    assert all("matmul" in {check["name"] for check in node["checks"]} for node in (first, second))


def test_gpus_that_do_not_sum_are_a_finding(tmp_path: Path) -> None:
    (code, out, err), (other, _, _) = ended(torchruns(tmp_path, "gpus", "--json"))
    assert code and other
    document = json.loads(out)
    assert document["exit_code"] == 7, err
    found = together(document)["all-reduce nccl"]
    assert (found["status"], found["figures"]["ranks"]) == ("failed", [0, 1])
    assert found["measured"].startswith(f"rank 0 on {os.uname().nodename}: ") and found["mend"]


@pytest.mark.skipif(MPIRUN is None, reason="there is no mpirun")
def test_ranks_of_mpirun_are_one_node(tmp_path: Path) -> None:
    assert MPIRUN is not None
    done = subprocess.run(
        [MPIRUN, "-n", "2", sys.executable, PLANTED, "fine", "--quick", "--parallel.tensor", "2"],
        cwd=tmp_path,
        env=environ(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "  ok       run folder      all ranks see it, and its locks hold" in done.stdout
    assert done.stdout.count("python") == 1
    assert done.stdout.splitlines()[-1].startswith("fit to train")


def test_a_missing_rank_is_a_finding_beside_those_of_the_own_machine(tmp_path: Path) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    alone = environ(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", **where)
    short = "import sys; from dtt.doctor import nodes; nodes.MEETING = 2.0; import runpy;"
    run = f"sys.argv = ['x', 'fine', '--json']; runpy.run_path({PLANTED!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", short + run],
        cwd=tmp_path,
        env=alone,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 7, done.stderr
    document = json.loads(done.stdout)
    assert "rank 1 of 2" in together(document)["meeting"]["measured"]
    assert {"python", "matmul"} <= {check["name"] for check in document["nodes"][0]["checks"]}


def test_silence_is_longer_than_several_beats() -> None:
    assert roll.SILENCE > 5 * roll.BEAT
