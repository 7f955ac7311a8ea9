"""A tracker may be slow, fail and hang: the caller does not notice, and is told once."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from dtt.metrics.background import HASTE, Background, close_all
from dtt.metrics.trackers import PATIENCE, WANDB_FINISH_SECONDS, Say, Tracker
from dtt.rendezvous.alarm import GRACE


class Recording:
    """A tracker that waits for `go` at each call, and keeps what it gets."""

    def __init__(self, go: bool = True) -> None:
        self.got: list[Any] = []
        self.threads: set[int] = set()
        self.go = threading.Event()
        self.waiting = threading.Event()
        if go:
            self.go.set()

    def log(self, step: int, figures: Any) -> None:
        self.waiting.set()
        self.go.wait(60)
        self.threads.add(threading.get_ident())
        self.got.append((step, figures))

    def text(self, step: int, name: str, text: str) -> None:
        self.log(step, (name, text))

    def picture(self, step: int, name: str, path: Path) -> None:
        self.log(step, (name, path.name))

    def close(self) -> None:
        self.got.append("closed")


def background(tracker: Tracker, **options: Any) -> tuple[Background, list[str]]:
    """A tracker behind its thread, and the warnings about it."""
    warnings: list[str] = []
    made = Background("T", lambda say, warn: tracker, info=unheard, warn=warnings.append, **options)
    return made, warnings


def unheard(text: str) -> None:
    raise AssertionError(f"no news was expected: {text}")


def test_everything_arrives_in_order_from_one_thread() -> None:
    tracker = Recording()
    behind, warnings = background(tracker)
    figures = {"a": 1.0}
    behind.log(1, figures)
    figures["a"] = 2.0  # the caller may go on using it
    behind.text(2, "n", "t")
    behind.picture(3, "p", Path("x/p.png"))
    close_all([behind], 60)
    expected: list[Any] = [(1, {"a": 1.0}), (2, ("n", "t")), (3, ("p", "p.png")), "closed"]
    assert tracker.got == expected and warnings == []
    assert tracker.threads and threading.get_ident() not in tracker.threads


def test_a_slow_tracker_loses_what_it_has_no_time_for() -> None:
    tracker = Recording(go=False)
    behind, warnings = background(tracker, capacity=3)
    behind.log(0, {})
    assert tracker.waiting.wait(60)
    for step in range(1, 11):  # three wait, seven are too many; nothing here blocks
        behind.log(step, {})
    assert behind.dropped == 7
    assert len(warnings) == 1 and "slower than the run" in warnings[0]
    tracker.go.set()
    close_all([behind], 60)
    assert [entry[0] for entry in tracker.got[:-1]] == [0, 1, 2, 3]
    assert warnings[1:] == ["T was too slow for 7 figures, which it lacks"]


def test_a_tracker_that_never_answers_does_not_keep_the_end() -> None:
    tracker = Recording(go=False)
    behind, warnings = background(tracker)
    behind.log(1, {})
    close_all([behind], 0.2)
    assert len(warnings) == 1 and "did not finish in 0 s" in warnings[0]
    tracker.go.set()


def test_a_full_queue_does_not_keep_the_end_either() -> None:
    tracker = Recording(go=False)
    behind, warnings = background(tracker, capacity=1)
    behind.log(0, {})
    assert tracker.waiting.wait(60)
    behind.log(1, {})
    close_all([behind], 0.2)
    assert behind.dropped == 1 and "did not finish" in warnings[-1]
    tracker.go.set()


class Failing(Recording):
    def log(self, step: int, figures: Any) -> None:
        self.waiting.set()
        self.go.wait(60)
        raise SystemExit("no\n  more disk")  # some clients end the process like this


def test_a_tracker_that_fails_is_left_alone() -> None:
    behind, warnings = background(Failing())
    behind.log(1, {})
    behind._thread.join(60)
    for step in range(2, 5):
        behind.log(step, {})
    close_all([behind], 60)
    assert warnings == ["T failed and is left alone from here on: SystemExit: no more disk"]


def test_one_that_cannot_be_made_is_said_and_left_alone() -> None:
    news: list[str] = []
    warnings: list[str] = []

    def make(say: Say, warn: Say) -> Tracker:
        say("here it is")
        warn("about to fail")
        raise ConnectionError("no route")

    behind = Background("T", make, info=news.append, warn=warnings.append)
    behind.log(1, {})
    close_all([behind], 60)
    assert news == ["here it is"]
    assert warnings == [
        "about to fail",
        "T failed and is left alone from here on: ConnectionError: no route",
    ]


class Freeing(Recording):
    """One whose end lets another go on."""

    def __init__(self, other: Recording) -> None:
        super().__init__()
        self.other = other

    def close(self) -> None:
        super().close()
        self.other.go.set()


def test_all_finish_at_the_same_time() -> None:
    """The first can only end once the second has."""
    first = Recording(go=False)
    second = Freeing(first)
    made = [background(tracker) for tracker in (first, second)]
    made[0][0].log(1, {})
    close_all([behind for behind, _ in made], 60)
    assert first.got[-1] == second.got[-1] == "closed"
    assert [warnings for _, warnings in made] == [[], []]


def test_one_that_has_failed_is_not_waited_for() -> None:
    """Not even with a full queue, which nobody empties any more."""
    tracker = Failing(go=False)
    behind, warnings = background(tracker, capacity=1)
    behind.log(1, {})
    assert tracker.waiting.wait(60)
    behind.log(2, {})
    tracker.go.set()
    close_all([behind], 1e6)
    assert len(warnings) == 1 and "failed and is left alone" in warnings[0]


def test_these_times_fit_into_others() -> None:
    assert WANDB_FINISH_SECONDS < PATIENCE
    assert 2 * HASTE < GRACE  # after which a rank that has lost another one is ended
