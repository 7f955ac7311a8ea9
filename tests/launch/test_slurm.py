"""Jobs on a real Slurm of two nodes: what happens to a run is what happens to it without Slurm."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm_bed import OVER, Cluster
from small_run import assert_same_run, command, flags, write_text

from dtt.launch import slurm as engine
from dtt.launch import watch
from dtt.launch.job import Job

pytestmark = [pytest.mark.processes, pytest.mark.thorough]
RUN = Path("runs/small")
PAUSE = "checkpoint.snapshot@step=8:sleep=4"
"""Rank 0 waits at step 8: time to do something to the job."""
Whole = Callable[[int], Path]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: Cluster) -> Path:
    """A working folder with text.txt in it, on a free cluster."""
    write_text(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTT_ENABLE_FAILPOINTS", "1")
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The run of so many ranks that nothing has happened to, without Slurm."""
    made: dict[int, Path] = {}

    def run(ranks: int) -> Path:
        if ranks not in made:
            base = tmp_path_factory.mktemp(f"ranks-{ranks}")
            write_text(base / "text.txt")
            words = ["train", *flags({"parallel.world_size": str(ranks)})]
            done = command(base, words, environ={"DTT_FAILPOINTS": ""})
            assert (done.code, done.err) == (0, "")
            made[ranks] = base / "runs" / "small"
        return made[ranks]

    return run


def submit(
    nodes: int = 2, *words: str, changes: dict[str, str | None] | None = None
) -> tuple[str, Job]:
    """Do what `dtt launch slurm` does; return the id of the (last) job."""
    parser = argparse.ArgumentParser()
    engine.add_options(parser)
    options = parser.parse_args(words)
    job = Job("small", RUN, tuple(flags(changes)), nodes)
    assert engine.run(job, options, engine.write(job, options)) == 0
    return str(attempts()[-1]["job"]), job


def attempts() -> list[dict[str, Any]]:
    path = RUN / "logs" / "attempts.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ends() -> list[tuple[int, list[str]]]:
    """Code and failed nodes of each attempt that is over."""
    return [(row["code"], row["failed"]) for row in attempts() if row["event"] == "ended"]


def log(job: str) -> str:
    return (RUN / "logs" / f"slurm-{job}.log").read_text(encoding="utf-8")


def await_checkpoint(slurm: Cluster, job: str, step: int) -> None:
    path = RUN / "checkpoints" / f"step-{step:08d}"
    slurm.until(lambda: path.exists() or slurm.state(job) in OVER, str(path))
    assert path.exists(), log(job)


def kill_rank() -> None:
    """End the rank that holds the run's lock, without a last word."""
    os.kill(json.loads((RUN / "lock").read_bytes())["pid"], signal.SIGKILL)


def test_two_nodes_train_as_two_workers_do(
    folder: Path, slurm: Cluster, whole: Whole, capsys: pytest.CaptureFixture[str]
) -> None:
    job, _ = submit()
    said = capsys.readouterr().out
    assert f"submitted job {job}: 2 nodes x 1 rank, runs/small" in said
    assert slurm.wait(job) == "COMPLETED", log(job)
    assert_same_run(RUN, whole(2))
    assert ends() == [(0, [])] and attempts()[1]["nodes"] == ["node1", "node2"]
    text = log(job)
    assert "step 24/24" in text and "attempt 1 at step 24 of 24: complete" in text
    assert (RUN / "logs" / "rank-1.log").read_text(encoding="utf-8") == ""
    assert watch.logs(RUN, 0, follow=False) == 0
    assert "step 24/24" in capsys.readouterr().out
    assert watch.status(RUN) == 0
    said = capsys.readouterr().out
    assert f"job {job} is over" in said and "step 24 of 24 (100%)" in said
    assert "attempt 1: node1,node2, steps 0 to 24" in said


def test_a_signal_before_the_wall_time_saves_and_requeues(
    folder: Path, slurm: Cluster, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTT_FAILPOINTS", PAUSE)
    job, _ = submit()
    await_checkpoint(slurm, job, 4)
    slurm.command("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@S does
    assert slurm.wait(job) == "COMPLETED", log(job)
    assert ends() == [(75, []), (0, [])]
    stopped = next(row["step"] for row in attempts() if row["event"] == "ended")
    assert 4 < stopped < 24 and f"goes on from step {stopped} on node[1-2]" in log(job)
    assert_same_run(RUN, whole(2))


def test_a_cancelled_job_saves_and_does_not_come_back(
    folder: Path, slurm: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTT_FAILPOINTS", PAUSE)
    job, _ = submit()
    await_checkpoint(slurm, job, 4)
    slurm.command("scancel", job)
    assert slurm.wait(job) == "CANCELLED"
    slurm.until(ends, "the end of the attempt")
    assert ends() == [(75, [])] and attempts()[-1]["step"] > 4, log(job)
    assert slurm.command("squeue", "-h") == ""


def test_a_node_that_dies_is_named_and_the_run_goes_on(
    folder: Path, slurm: Cluster, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTT_FAILPOINTS", PAUSE)
    job, _ = submit()
    await_checkpoint(slurm, job, 4)
    slurm.kill_node("node2")
    try:
        slurm.until(lambda: slurm.state(job) == "PENDING", "the requeue of the job")
    finally:
        slurm.start_node("node2")
    assert slurm.wait(job) == "COMPLETED", log(job)
    (code, failed), last = ends()
    # Slurm may leave the batch script the time to write that down, or the next attempt does it.
    assert (code in (-1, 137), failed, last) == (True, ["node2"], (0, [])), attempts()
    assert_same_run(RUN, whole(2))


def test_a_node_that_failed_twice_is_left_out(
    folder: Path, slurm: Cluster, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where a job may not be requeued, a new one goes on after it."""
    monkeypatch.setenv("DTT_FAILPOINTS", f"{PAUSE};{PAUSE.replace('8', '16')}")
    first, _ = submit(1)
    await_checkpoint(slurm, first, 4)
    slurm.command("scontrol", "update", f"JobId={first}", "Requeue=0")
    kill_rank()
    assert slurm.wait(first) == "FAILED", log(first)
    job = attempts()[-1]["job"]
    assert job != first and f"job {job} goes on after it" in log(first)
    await_checkpoint(slurm, job, 12)
    kill_rank()
    assert slurm.wait(job) == "COMPLETED", log(job)
    assert "going on without node1, which failed twice" in log(job)
    assert ends() == [(137, ["node1"]), (137, ["node1"]), (0, [])]
    begun = [(row["job"], row["nodes"]) for row in attempts() if row["event"] == "begun"]
    assert begun == [(first, ["node1"]), (job, ["node1"]), (job, ["node2"])]
    assert {row["chain"] for row in attempts()} == {first}
    assert_same_run(RUN, whole(1))


def test_what_cannot_succeed_is_not_tried_again(folder: Path, slurm: Cluster) -> None:
    job, _ = submit(changes={"data.source.path": "missing.txt"})
    assert slurm.wait(job) == "FAILED"
    shown = slurm.command("scontrol", "show", "job", job)
    found = int(re.findall(r"ExitCode=(\d+):0", shown)[0])
    assert found == 3 and re.findall(r"Restarts=(\d+)", shown) == ["0"]
    assert ends() == [(3, [])] and "another attempt would fail the same way" in log(job)


def test_a_chain_downloads_tokenizes_and_trains(
    folder: Path, slurm: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {
        "data.source.name": "tales",
        "data.source.path": None,
        "data.source.stories": "400",
        "tokenizer.name": "byte",
    }
    job, _ = submit(2, "--chain", changes=source)
    ids = re.findall(r"submitted job (\d+)", capsys.readouterr().out)
    assert len(ids) == 3 and ids[-1] == job
    assert [slurm.wait(each) for each in ids] == ["COMPLETED"] * 3
    assert "train:" in (RUN / "logs" / f"tokenize-{ids[1]}.log").read_text(encoding="utf-8")
    assert "prepared" not in log(job) and "step 24/24" in log(job)


def test_tasks_of_an_array_tokenize_together(folder: Path, slurm: Cluster) -> None:
    script = Path(engine.__file__).parents[2] / "sbatch" / "tokenize.sh"
    (folder / "run.yaml").write_text(
        "data: {source: {name: tales, stories: 3000}}\ntokenizer: {name: byte}\n", encoding="utf-8"
    )
    environ = {**os.environ, "CONFIG": "run.yaml", "PYTHON": engine.Job.python}
    words = ["sbatch", "--parsable", "--array=1-3", "--nodes=1", str(script)]
    job = slurm.command(*words, env=environ).strip()
    slurm.until(lambda: not slurm.command("squeue", "-h"), "the end of the array")
    logs = sorted(folder.glob("dtt-tokenize-*.log"))
    assert len(logs) == 3, job
    manifests = list((folder / "data").glob("*/manifest.json"))
    assert len(manifests) == 1 and not (folder / "data" / ".crew").exists()
