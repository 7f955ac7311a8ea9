"""Several machines: those that are left go on without one, and with one that comes later.

Most of these have two launchers on this machine; the last gives each a network of its own.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_run import (
    Machine,
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

from dtt.errors import PeerError
from dtt.launch import elastic
from dtt.machine import free_port

pytestmark = [pytest.mark.processes, pytest.mark.thorough]
RUN = Path("runs/small")
SETTINGS = {
    "optimizer.name": "adamw",
    "evaluation.every": "0",
    "checkpoint.every": "5",
    "logging.every": "1",
}
Start = Callable[..., Any]


@pytest.fixture
def launcher(folder: Path) -> Iterator[Start]:
    """Starts the launcher of a machine; what is left at the end is killed."""
    port, started = free_port(), []

    def begin(name: str, nodes: str = "1:2", *, slow: float = 0.1, **changes: str) -> Any:
        here = f"is_host={int(name == 'one')}"  # it has the place where they meet
        words = ("--nnodes", nodes, "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", here)
        settings = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
        machine = Machine(name, (*words, "-m", "dtt", "train"))
        started.append(start(folder, flags(settings), slow=slow, machine=machine))
        return started[-1]

    yield begin
    for process in started:
        for each in (process.pid, *(children(process) if process.is_alive() else ())):
            if process.is_alive():
                os.kill(each, signal.SIGKILL)


def text(machine: str, stream: str) -> str:
    return Path(machine, stream).read_text(encoding="utf-8")


def test_a_machine_is_lost_and_another_joins(folder: Path, launcher: Start) -> None:
    steps = {"training__max_steps": "120"}
    words = flags(SETTINGS | {"training.max_steps": "120", "name": "whole"})
    whole = command(folder, ["train", *words, "--parallel.world_size", "2"])
    assert whole.code == 0, whole.err
    one = launcher("one", **steps)
    two = launcher("two", **steps)
    await_step(RUN, 12)
    for each in (two.pid, *children(two)):  # as if it had lost its power
        os.kill(each, signal.SIGKILL)
    await_step(RUN, 30)
    three = launcher("three", **steps)
    done = wait(one, folder / "one", 120)
    assert done.code == 0, done.err
    assert wait(three, folder / "three").code == 0
    first, second = done.err.splitlines()
    assert "lost another rank; restart 1 of 3 without a new checkpoint, from step" in first
    assert second == "dtt train: another machine joins the run, which goes on from here"
    assert text("two", "err") == text("three", "err") == ""
    ranks = [line.split()[-2] for line in text("one", "out").splitlines() if "forwards x" in line]
    assert ranks[-1] == "2" and "1" in ranks
    theirs, ours = losses(Path("runs/whole")), losses(RUN)
    assert ours.keys() == theirs.keys() and len(ours) == 120
    assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-5)
    assert samples(RUN) == samples(Path("runs/whole"))


def test_a_signal_to_one_launcher_stops_both(folder: Path, launcher: Start) -> None:
    machines = {name: launcher(name, "2") for name in ("one", "two")}
    await_step(RUN, 3)
    os.kill(machines["two"].pid, signal.SIGUSR1)
    for name, process in machines.items():
        done = wait(process, folder / name)
        assert (done.code, done.err) == (75, "")
    machines = {name: launcher(name, "2", slow=0) for name in ("one", "two")}
    assert [wait(machines[name], folder / name).code for name in machines] == [0, 0]
    whole = command(folder, ["train", *flags(SETTINGS | {"name": "whole"}), "--world-size", "2"])
    assert whole.code == 0
    assert_same_run(RUN, Path("runs/whole"))


def test_the_machine_where_they_meet_is_lost(folder: Path, launcher: Start) -> None:
    one, two = launcher("one"), launcher("two")
    await_step(RUN, 7)
    for each in (one.pid, *children(one)):
        os.kill(each, signal.SIGKILL)
    done = wait(two, folder / "two")
    assert done.code == 7
    lost, end = done.err.splitlines()
    assert lost.endswith("lost another rank; restart 1 of 3 without a new checkpoint, from step 5")
    assert "where the machines meet, cannot be reached any more; start" in end


def test_a_failure_on_one_machine_ends_the_run_on_both(folder: Path, launcher: Start) -> None:
    one = launcher("one", "2")
    two = launcher("two", "2", training__max_steps="25")
    codes = [wait(one, folder / "one").code, wait(two, folder / "two").code]
    assert codes == [2, 2]
    # Once on each machine whose rank could say it before the other machine's end reached it.
    said = [text(name, "err").count("ranks differ in their config") for name in ("one", "two")]
    assert sorted(said) in ([0, 1], [1, 1])


def test_ranks_that_do_not_divide_the_batch_wait(folder: Path, launcher: Start) -> None:
    """Of four machines there are three; eight sequences are divided by two of them."""
    names = ("one", "two", "three")
    machines = {name: launcher(name, "1:4", slow=0.3) for name in names}
    await_step(RUN, 8)
    said = "".join(text(name, "err") for name in names)
    assert "3 ranks are there, and 2 can divide the batch; the rest wait" in said
    idle = [name for name in names if not children(machines[name])]
    assert len(idle) == 1
    gone = next(name for name in names if name not in idle and not text(name, "out"))
    for each in (machines[gone].pid, *children(machines[gone])):
        os.kill(each, signal.SIGKILL)
    for name in names:
        if name != gone:
            assert wait(machines[name], folder / name, 120).code == 0
    assert sorted(losses(RUN)) == list(range(1, 25))


@pytest.mark.parametrize(
    ("words", "code", "fact"),
    [
        (["-m", "dtt", "generate", "x"], 2, "starts `dtt train`, and not `dtt generate`"),
        (["train.py", "--max-steps", "3"], 2, "starts `-m dtt train ...` and nothing else"),
        (["--nnodes", "2:1", "-m", "dtt", "train"], 2, "min_nodes"),
        (["--nproc-per-node", "3", "-m", "dtt", "train"], 2, "ranks (3); the nearest"),
        (["-m", "dtt", "train", "--max-stepz", "3"], 2, "did you mean --max-steps?"),
        (["--nnodes", "one", "-m", "dtt", "train"], 2, "launcher: "),
        (["--nnodes", "2", "--rdzv-backend", "x", "-m", "dtt", "train"], 2, "launcher: "),
    ],
)
def test_arguments_that_cannot_be(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, fact: str
) -> None:
    assert elastic.main(words) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("dtt train: error: ") and fact in err, err


def test_a_place_to_meet_where_nobody_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody listens yet, or the name is not known: it is waited for, and said."""
    soon = "is_host=0,join_timeout=8"
    port = free_port()
    for host, why in (("127.0.0.1", "nobody listens at"), ("nowhere.invalid", "cannot resolve")):
        place = f"{host}:{port}"
        words = ["--nnodes", "2", "--rdzv-endpoint", place, "--rdzv-conf", soon]
        assert elastic.main([*words, "-m", "dtt", "train"]) == PeerError.exit_code
        waits, ends = capsys.readouterr().err.splitlines()
        said = f"dtt train: waiting for {place}, where the machines of this run meet: "
        assert waits.startswith(said) and why in waits, waits
        assert f"the machines cannot meet at {place}: " in ends and why in ends, ends
