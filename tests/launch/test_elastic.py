"""Workers of one machine survive what happens to them, and a run ends with the right code."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from small_run import (
    STEPS,
    assert_same_run,
    await_step,
    children,
    command,
    flags,
    losses,
    samples,
    start,
    wait,
)

from dtt.runs import newest_step

pytestmark = pytest.mark.processes
Uninterrupted = Callable[[int], Path]
RUN = Path("runs/small")
TWO = {
    "parallel.world_size": "2",
    "logging.every": "1",
    "checkpoint.background": "false",  # so that what is saved when one dies is certain
}


def restarted(err: str) -> list[str]:
    """The lines on stderr, all of which tell of restarts, without what is the same in all."""
    lines = [line for line in err.splitlines() if "failpoints are active" not in line]
    assert all(line.startswith("dtt train: ") and "; restart " in line for line in lines), err
    return [line.removeprefix("dtt train: ") for line in lines]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_worker(folder: Path, uninterrupted: Uninterrupted, killed: int) -> None:
    """The run goes on from the last checkpoint and is bitwise the one that nothing stopped."""
    done = command(folder, ["train", *flags(TWO)], die=(killed, 11), slow=0.02)
    assert done.code == 0, done.err
    (line,) = restarted(done.err)
    assert line == (
        f"rank {killed} died by SIGKILL; restart 1 of 3 without a new checkpoint, from step 10"
    )
    assert done.out.count("continuing runs/small from step 10") == 1
    assert_same_run(RUN, uninterrupted(2))
    assert samples(RUN) == samples(uninterrupted(2)) and len(samples(RUN)) == STEPS


def test_all_workers_killed(folder: Path, uninterrupted: Uninterrupted) -> None:
    process = start(folder, ["train", *flags(TWO)], slow=0.05)
    await_step(RUN, 9)
    for worker in children(process):
        os.kill(worker, signal.SIGKILL)
    done = wait(process, folder)
    assert done.code == 0 and len(restarted(done.err)) == 1
    assert_same_run(RUN, uninterrupted(2))


def test_killed_before_the_first_checkpoint_of_a_fresh_run(
    folder: Path, uninterrupted: Uninterrupted
) -> None:
    """--fresh removes the old run once, and never what a restart is to go on from."""
    assert command(folder, ["train", *flags(TWO | {"seed": "5"})]).code == 0
    done = command(folder, ["train", *flags(TWO), "--fresh"], die=(1, 3), slow=0.02)
    assert done.code == 0 and restarted(done.err)[0].endswith("from the beginning")
    assert "continuing" not in done.out
    assert_same_run(RUN, uninterrupted(2))
    done = command(folder, ["train", *flags(TWO), "--fresh"], die=(1, 9), slow=0.02)
    assert done.code == 0 and restarted(done.err)[0].endswith("from step 8")
    assert "continuing runs/small from step 8" in done.out
    assert_same_run(RUN, uninterrupted(2))


def test_no_progress(folder: Path, uninterrupted: Uninterrupted) -> None:
    """What kills the workers at the same step at every start ends the run with 76."""
    environ = {
        "DTT_ENABLE_FAILPOINTS": "1",
        "DTT_FAILPOINTS": "checkpoint.snapshot@step=12:kill9",
    }
    done = command(folder, ["train", *flags(TWO)], environ=environ, slow=0.02)
    assert done.code == 76
    *before, last = [line for line in done.err.splitlines() if "failpoints" not in line]
    counts = [line.split("restart ")[1].split(" ")[0] for line in restarted("\n".join(before))]
    assert counts == ["1", "2", "3"]
    assert last == (
        "dtt train: error: rank 0 died by SIGKILL, and 3 restarts made no new checkpoint; "
        "fix the cause; then the same command goes on from step 10"
    )
    assert newest_step(RUN) == 10
    assert command(folder, ["train", *flags(TWO)]).code == 0
    assert_same_run(RUN, uninterrupted(2))


@pytest.mark.thorough
def test_killed_in_every_second_save_of_many_files(folder: Path) -> None:
    """Rank 0, which waits for the file of the dead one, is ended; each start gets one save on."""
    changes = TWO | {"parallel.tensor": "2", "training.max_steps": "16", "evaluation.every": "0"}
    assert command(folder, ["train", *flags(changes | {"name": "whole"})]).code == 0
    environ = {
        "DTT_ENABLE_FAILPOINTS": "1",
        "DTT_FAILPOINTS": "storage.open@file=optimizer-00002-of-00002.safetensors,hit=2:kill9",
    }
    done = command(folder, ["train", *flags(changes)], environ=environ, grace=0.5)
    assert done.code == 0, done.err
    what = "rank 1 died by SIGKILL; restart 1 of 3 without a new checkpoint, from step"
    assert restarted(done.err) == [f"{what} {step}" for step in (4, 8, 12)]
    assert_same_run(RUN, Path("runs/whole"))


@pytest.mark.parametrize("code", [2, 3, 4, 6, 70])
def test_what_would_fail_again_is_not_restarted(folder: Path, code: int) -> None:
    environ = {
        "DTT_ENABLE_FAILPOINTS": "1",
        "DTT_FAILPOINTS": f"checkpoint.snapshot@step=4:exit={code}",
    }
    done = command(folder, ["train", *flags(TWO)], environ=environ)
    assert done.code == code and restarted(done.err) == []
    assert done.out.count("    run  runs/small") == 1


def test_an_interrupt_from_the_terminal(folder: Path, uninterrupted: Uninterrupted) -> None:
    """Ctrl-C reaches launcher and workers at once; the launcher lets them save."""
    process = start(folder, ["train", *flags(TWO)], slow=0.05)
    await_step(RUN, 6)
    os.killpg(process.pid, signal.SIGINT)
    done = wait(process, folder)
    assert (done.code, done.err) == (75, "")
    assert done.out.endswith("saved; the same command goes on from there\n")
    stopped = len(losses(RUN))
    assert 6 <= stopped < STEPS and newest_step(RUN) == stopped
    assert command(folder, ["train", *flags(TWO)]).code == 0
    assert_same_run(RUN, uninterrupted(2))


def test_a_second_interrupt_ends_at_once(folder: Path) -> None:
    process = start(folder, ["train", *flags(TWO)], slow=3)  # seconds in each step
    await_step(RUN, 1)
    workers = children(process)
    while process.is_alive():
        os.kill(process.pid, signal.SIGINT)
        process.join(0.2)
    assert wait(process, folder).code == 130
    assert not [worker for worker in workers if Path(f"/proc/{worker}/cwd").exists()]
    assert max(losses(RUN)) <= 2


@pytest.mark.parametrize("time", [1, 2])
def test_four_ranks_exit_cleanly(folder: Path, time: int) -> None:
    changes = {"parallel.world_size": "4", "training.max_steps": "3", "evaluation.every": "0"}
    done = command(folder, ["train", *flags(changes)])
    assert (done.code, done.err) == (0, "")
    assert done.out.count("done: 3 steps") == 1
