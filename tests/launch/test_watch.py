"""What is said of a run and of its jobs, with commands that play Slurm."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dtt.commands import launch
from dtt.errors import CheckpointError, ConfigError
from dtt.launch.attempts import record_of
from dtt.launch.watch import logs, status
from dtt.metrics.progress import Progress
from dtt.runs import newest_step


def test_status_of_a_run_that_slurm_never_saw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtt.storage import RunLock

    monkeypatch.setenv("PATH", str(tmp_path))
    run = tmp_path / "run"
    with RunLock(run):
        (run / "logs").mkdir()
        Progress(480, 1000, 34500.0, 125.0, 0.2, 1.2).write(run)
        (run / "checkpoints" / "step-00000400").mkdir(parents=True)
        assert status(run) == 0
    text = capsys.readouterr().out
    assert "trains it, since" in text and "step 480 of 1,000 (48%)  34.5k tok/s  2m05s left" in text
    assert "newest checkpoint: step 400, a save takes 1.2s" in text
    status(run)
    text = capsys.readouterr().out
    assert "nobody on this machine trains it now" in text and "left" not in text
    assert newest_step(run) == 400


def test_status_of_a_job_that_waits_and_of_one_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    record, job = record_of(run), {"job": "12", "chain": "12", "step": 0}
    record.add("begun", **job, nodes=["node1", "node2"])
    record.add("ended", **job, code=3, failed=[], why="")
    squeue = tmp_path / "squeue"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    log = run / "logs" / "slurm-12.log"
    log.write_text("dtt train: error: no.txt does not exist; name another\nsrun: done\n")
    status(run)
    text = capsys.readouterr().out
    assert "job 12 is over" in text and "attempt 1: node1,node2, steps 0 to 0" in text
    assert "slurm-12.log: dtt train: error: no.txt does not exist; name another" in text
    squeue.write_text('#!/bin/bash\necho "12|PENDING|Resources||0:00|1:00:00|N/A|2"\n')
    squeue.chmod(0o755)
    status(run)
    assert "job 12  waits for 2 nodes (Resources)" in capsys.readouterr().out


def test_logs_of_a_rank_that_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    for rank in range(2):
        (tmp_path / "logs" / f"rank-{rank}.log").write_text(f"I am {rank}\n")
    assert logs(tmp_path, 1, follow=False) == 0
    assert capsys.readouterr().out == "I am 1\n"
    with pytest.raises(ConfigError, match="ranks 0 to 1 have one"):
        logs(tmp_path, 2, follow=False)


def test_a_torn_line_of_the_record_is_left_out(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    record.add("begun", job="1", chain="1", nodes=["a"], step=0)
    with record.path.open("a") as file:
        file.write('{"event": "en')
    assert [row["event"] for row in record.rows()] == ["begun"]
    assert json.loads(record.path.read_text().splitlines()[0])["job"] == "1"


def test_the_newest_run_is_that_of_a_job_that_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no configuration yet; and what is no run is said as everywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    old = Path("runs/old")
    old.mkdir(parents=True)
    (old / "config.yaml").write_text("")
    for path in (old / "config.yaml", old):
        os.utime(path, (1e9, 1e9))
    record_of(Path("runs/new")).add("submitted", job="7", chain="7")
    assert launch.run(["status"]) == 0
    assert capsys.readouterr().out.startswith("runs/new\n")
    with pytest.raises(CheckpointError) as refused:
        launch.run(["status", "old"])
    assert refused.value.fix == "did you mean runs/old?"
