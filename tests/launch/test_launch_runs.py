"""Real runs that `dtt launch` starts on this machine, and stops."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import flags, losses, write_text

from dtt.machine import free_port

pytestmark = [pytest.mark.processes, pytest.mark.thorough]

MPIRUNS = {
    "mpich": shutil.which("mpirun", path=str(Path(sys.executable).parent)),
    "openmpi": shutil.which("mpirun.openmpi"),
}
FEW = {"training.max_steps": "6", "evaluation.every": "0", "checkpoint.every": "0"}
ENDLESS = {**FEW, "training.max_steps": "100000", "logging.every": "1"}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    write_text(tmp_path / "text.txt")
    yield tmp_path


def launch(engine: str, changes: dict[str, str]) -> list[str]:
    return [sys.executable, "-m", "dtt", "launch", *engine.split(), *flags(changes)]


def environ(path: str | None = None) -> dict[str, str]:
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    found = {**os.environ, **root, "OMP_NUM_THREADS": "1"}
    return found if path is None else {**found, "PATH": f"{path}:{found['PATH']}"}


@pytest.mark.parametrize("engine", ["local", "torchrun"])
def test_ranks_of_this_machine_train(folder: Path, engine: str) -> None:
    words = launch(f"{engine} --ranks-per-node 2", {**FEW, "name": engine})
    done = subprocess.run(words, cwd=folder, env=environ(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 x 1 forwards x 2 ranks" in done.stdout
    assert list(losses(folder / "runs" / engine)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("flavour", MPIRUNS)
def test_mpirun_lets_ranks_save_when_it_is_asked_to_stop(folder: Path, flavour: str) -> None:
    program = MPIRUNS[flavour]
    if program is None:
        pytest.skip(f"mpirun of {flavour} is not here: pip install mpich, apt-get openmpi-bin")
    path = Path(program).parent
    if Path(program).name != "mpirun":
        path = folder / "bin"
        path.mkdir()
        (path / "mpirun").symlink_to(program)
    port = free_port()
    words = launch(f"mpi --ranks-per-node 2 --master-port {port}", ENDLESS)
    process = subprocess.Popen(
        words,
        cwd=folder,
        env=environ(str(path)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        metrics, end = folder / "runs" / "small" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert any((folder / "runs" / "small" / "checkpoints").glob("step-????????"))
