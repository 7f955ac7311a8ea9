"""What the ends of workers mean: done, stopped, failed for good, or lost and worth a restart."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dtt.errors import (
    EXIT_DONE,
    EXIT_PREEMPTED,
    BusyError,
    NoProgressError,
    PeerError,
)
from dtt.runs import newest_step

GOOD = (EXIT_DONE, EXIT_PREEMPTED)


@dataclass(frozen=True)
class Lost:
    """A failure that another start may not meet again; `what` says it in half a sentence."""

    what: str
    busy: bool = False
    """Whether the run folder was in use: by a rank that its own launcher has yet to end."""


def judge(codes: Mapping[int, int], host: str, *, again: bool) -> int | Lost:
    """Return the exit code that the codes of a machine's ranks amount to, or what was lost.

    A rank that a signal killed is the cause, and that others lost it (code 7) the consequence; any
    other failure comes before a loss, too, since it would only be met again. `again`: this is a
    restart, so that a run folder in use may be so by ranks of the start before. `host` is said
    where there are several.
    """
    where = f" on {host}" if host else ""
    bad = {rank: code for rank, code in codes.items() if code not in GOOD}
    if not bad:
        return EXIT_PREEMPTED if EXIT_PREEMPTED in codes.values() else EXIT_DONE
    for rank, code in sorted(bad.items()):
        if code < 0:
            return Lost(f"rank {rank}{where} died by {_signal_name(-code)}")
    for code in bad.values():
        if code == BusyError.exit_code and again:
            return Lost(f"the run folder was in use when its ranks began again{where}", busy=True)
        if code != PeerError.exit_code:
            return code
    if EXIT_PREEMPTED in codes.values():
        return EXIT_PREEMPTED  # one was asked to stop before there was anything to save
    rank = min(bad)
    return Lost(f"rank {rank}{where} lost another rank")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Restarts:
    """Counts restarts since the newest committed checkpoint of a run last advanced."""

    def __init__(self, run: Path, allowed: int, command: str) -> None:
        self._run, self._allowed, self._command = run, allowed, command
        self._made, self._newest = 0, newest_step(run)

    def count(self, lost: Lost, say: Callable[[str], None]) -> None:
        """Count one more restart and `say` so in a line, or refuse it.

        Raises PeerError if restarts are not allowed, and NoProgressError if as many as are allowed
        made no new checkpoint.
        """
        newest = newest_step(self._run)
        if newest != self._newest:
            self._made, self._newest = 0, newest
        start = f"from step {newest}" if newest else "from the beginning"
        if self._allowed == 0:
            raise PeerError(lost.what, f"{self._command} goes on {start}")
        if self._made == self._allowed:
            raise NoProgressError(
                f"{lost.what}, and {self._made} restarts made no new checkpoint",
                f"fix the cause; then {self._command} goes on {start}",
            )
        self._made += 1
        count = f"restart {self._made} of {self._allowed} without a new checkpoint"
        say(f"{lost.what}; {count}, {start}")
