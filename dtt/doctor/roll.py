"""Who is still there while machines examine themselves: each rank gives a sign every second, and
the main one knows whose have stopped. A collective would only say that somebody is gone.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType

from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from dtt.dist import Runtime
from dtt.doctor.finding import Finding
from dtt.errors import PeerError

BEAT = 1.0
"""Seconds between two signs of life."""
SILENCE = 15.0
"""Seconds without one after which a rank is lost. What it measures runs in other processes, so that
even a busy rank gives its signs."""


ANSWER = 5.0
"""Seconds that ranks have to say that they are well, after a loss: all notice it at once."""


class Roll:
    """What the ranks of a launch tell the main one, between `with` and its end."""

    def __init__(self, runtime: Runtime) -> None:
        assert runtime.alarm is not None, "there are other ranks"
        self.runtime = runtime
        self.store = PrefixStore("doctor", runtime.alarm.store)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Roll:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join(2 * BEAT)

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the main rank is gone, which the waiting ones see
            while not self._done.is_set():
                self.store.add(f"alive {self.runtime.rank}", 1)
                self._done.wait(BEAT)

    def hand_in(self, findings: Sequence[Finding]) -> None:
        """Tell the main rank what this one has found; of all ranks but the first of each machine
        that is nothing."""
        rows = json.dumps([asdict(finding) for finding in findings])
        self.store.set(f"found {self.runtime.rank}", rows)

    def collect(self) -> tuple[list[list[Finding]], list[int]]:
        """Return what each rank has handed in, and which were lost before: on the main rank."""
        waiting, beats = set(range(self.runtime.ranks)), [0] * self.runtime.ranks
        heard = [time.monotonic()] * self.runtime.ranks
        lost = []
        while waiting:
            for rank in sorted(waiting):
                beat, now = self.store.add(f"alive {rank}", 0), time.monotonic()
                if beat != beats[rank]:
                    beats[rank], heard[rank] = beat, now
                if self.store.check([f"found {rank}"]):
                    waiting.remove(rank)
                elif now - heard[rank] > SILENCE:
                    waiting.remove(rank)
                    lost.append(rank)
            if waiting:
                time.sleep(BEAT / 2)
        self.store.set("lost", json.dumps(lost))
        found = []
        for rank in range(self.runtime.ranks):
            rows = [] if rank in lost else json.loads(self.store.get(f"found {rank}"))
            found.append([Finding(**row) for row in rows])
        return found, lost

    def learn(self) -> list[int]:
        """Return which ranks were lost, once the main rank knows; PeerError: it is lost itself."""
        try:
            while not self.store.check(["lost"]):
                time.sleep(BEAT / 2)
            lost: list[int] = json.loads(self.store.get("lost"))
        except RuntimeError as error:
            raise PeerError("the main rank was lost", "see its messages") from error
        return lost

    def call(self) -> list[int]:
        """After a collective that failed: return, on the main rank, which ranks do not answer.

        Those answer that call it too.
        """
        waiting, deadline = list(range(self.runtime.ranks)), time.monotonic() + ANSWER
        with suppress(RuntimeError):  # the main rank is gone
            self.store.set(f"well {self.runtime.rank}", "")
            while self.runtime.is_main and waiting and time.monotonic() < deadline:
                waiting = [rank for rank in waiting if not self.store.check([f"well {rank}"])]
                time.sleep(BEAT / 10)
        return waiting if self.runtime.is_main else []
