"""Signals that ask a run to stop: they set a flag, and the loop acts at the next step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from dtt.errors import EXIT_PREEMPTED, DttError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class _Early:
    """The signal that came before the loop, and how many `exit_on_preemption` are open."""

    requested: signal.Signals | None = None
    depth = 0


@contextlib.contextmanager
def exit_on_preemption() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 end the process with the exit code of preemption.

    For the time in which there is nothing to save; `Preemption` takes over in the loop. There it
    begins as asked where the exit did not come through: Python drops what is raised inside of a
    callback (as logging's at a fork) or a finalizer, and other code may make another error of it.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        _Early.requested = signal.Signals(number)
        raise SystemExit(EXIT_PREEMPTED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    _Early.depth += 1
    try:
        yield
    except DttError:
        raise
    except Exception as error:
        if _Early.requested is not None:
            raise SystemExit(EXIT_PREEMPTED) from error
        raise
    finally:
        _Early.depth -= 1
        if not _Early.depth:
            _Early.requested = None
        for number, handler in before.items():
            signal.signal(number, handler)


class Preemption:
    """Catches SIGINT, SIGTERM and SIGUSR1 between `with` and its end.

    The handler only sets `requested` (saving inside of a handler deadlocks, Lightning #21406). A
    second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = _Early.requested
        self._before: dict[signal.Signals, Any] = {}

    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.requested is not None

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number)
