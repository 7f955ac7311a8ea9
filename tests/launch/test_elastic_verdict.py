"""What the ends of workers mean."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from dtt.errors import NoProgressError, PeerError
from dtt.launch.elastic_verdict import Lost, Restarts, judge
from dtt.runs import newest_step

KILLED = Lost("rank 1 died by SIGKILL")


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([0, 75], 75),
        ([7, -9], KILLED),  # the cause, not the consequence
        ([3, -9], KILLED),
        ([7, 7], Lost("rank 0 lost another rank")),
        ([0, 7], Lost("rank 1 lost another rank")),
        ([7, 75], 75),
        ([7, 2], 2),
        ([3, 7], 3),
        ([7, 4], 4),
        ([7, 5], 5),
        ([6, 7], 6),
        ([7, 70], 70),
        ([7, 8], 8),
        ([0, -34], Lost("rank 1 died by SIGRTMIN")),
        ([0, -35], Lost("rank 1 died by signal 35")),
    ],
)
def test_judge(codes: list[int], verdict: int | Lost) -> None:
    assert judge(dict(enumerate(codes)), "", again=False) == verdict


def test_where_is_said_among_several_machines() -> None:
    assert judge({4: -11}, "node7", again=False) == Lost("rank 4 on node7 died by SIGSEGV")


def test_a_busy_folder_is_waited_for_after_a_restart_only() -> None:
    assert judge({0: 8, 1: 8}, "", again=False) == 8
    outcome = judge({0: 8, 1: 8}, "", again=True)
    assert isinstance(outcome, Lost) and outcome.busy


def test_restarts_are_counted_since_the_newest_checkpoint(tmp_path: Path) -> None:
    said: list[str] = []
    restarts = Restarts(tmp_path, 3, "the same command")
    for number in (1, 2):
        restarts.count(KILLED, said.append)
        assert said[-1] == (
            f"rank 1 died by SIGKILL; restart {number} of 3 without a new checkpoint, "
            "from the beginning"
        )
    (tmp_path / "checkpoints" / "step-00000008").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000012.abc.tmp").mkdir()
    for number in (1, 2, 3):
        restarts.count(KILLED, said.append)
        assert said[-1].endswith(f"restart {number} of 3 without a new checkpoint, from step 8")
    with pytest.raises(NoProgressError, match=r"SIGKILL, and 3 restarts made no .* from step 8"):
        restarts.count(KILLED, said.append)
    assert len(said) == 5


def test_no_restarts(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path / "gone", 0, "the same command without --fresh")
    with pytest.raises(PeerError, match=r"SIGKILL; the same command without --fresh goes on"):
        restarts.count(KILLED, print)


def test_newest_step(tmp_path: Path) -> None:
    assert newest_step(tmp_path / "gone") == 0
    for step, name in itertools.product((4, 100), ("", ".old", ".1f.tmp")):
        (tmp_path / "checkpoints" / f"step-{step:08d}{name}").mkdir(parents=True)
    assert newest_step(tmp_path) == 100
