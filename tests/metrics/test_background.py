"""A tracker may be slow, fail and hang: the caller does not notice, and is told once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtt.metrics.background import Background
from dtt.metrics.trackers import Tracker


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
    warnings: list[str] = []
    return Background("T", lambda say: tracker, warnings.append, **options), warnings


def test_everything_arrives_in_order_from_one_thread() -> None:
    tracker = Recording()
    behind, warnings = background(tracker)
    figures = {"a": 1.0}
    behind.log(1, figures)
    figures["a"] = 2.0  # the caller may go on using it
    behind.text(2, "n", "t")
    behind.picture(3, "p", Path("x/p.png"))
    behind.close()
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
    behind.close()
    assert [entry[0] for entry in tracker.got[:-1]] == [0, 1, 2, 3]
    assert warnings[1:] == ["T was too slow for 7 figures, which it lacks"]


def test_a_tracker_that_never_answers_does_not_keep_the_end() -> None:
    tracker = Recording(go=False)
    behind, warnings = background(tracker, patience=0.2)
    behind.log(1, {})
    behind.close()
    assert len(warnings) == 1 and "did not finish in 0 s" in warnings[0]
    tracker.go.set()


def test_a_full_queue_does_not_keep_the_end_either() -> None:
    tracker = Recording(go=False)
    behind, warnings = background(tracker, capacity=1, patience=0.2)
    behind.log(0, {})
    assert tracker.waiting.wait(60)
    behind.log(1, {})
    behind.close()
    assert behind.dropped == 1 and "did not finish" in warnings[-1]
    tracker.go.set()


class Failing(Recording):
    def log(self, step: int, figures: Any) -> None:
        raise SystemExit("no\n  more disk")  # some clients end the process like this


def test_a_tracker_that_fails_is_left_alone() -> None:
    behind, warnings = background(Failing())
    behind.log(1, {})
    behind._thread.join(60)
    for step in range(2, 5):
        behind.log(step, {})
    behind.close()
    assert warnings == ["T failed and is left alone from here on: SystemExit: no more disk"]


def test_one_that_cannot_be_made_is_said_and_left_alone() -> None:
    warnings: list[str] = []

    def make(say: Callable[[str], None]) -> Tracker:
        say("about to fail")
        raise ConnectionError("no route")

    behind = Background("T", make, warnings.append)
    behind.log(1, {})
    behind.close()
    assert warnings == [
        "about to fail",
        "T failed and is left alone from here on: ConnectionError: no route",
    ]
