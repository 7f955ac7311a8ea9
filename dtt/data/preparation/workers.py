"""Processes that apply a function to parts: of this machine, or (`dask`) of a cluster.

A `Pool` takes one part at a time, so that its user decides when each part is started.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, closing, contextmanager
from multiprocessing.connection import wait
from typing import Any, Protocol

from dtt.data.sources import Part
from dtt.errors import PeerError
from dtt.machine import cores

Function = Callable[[Part], Any]


class Pool(Protocol):
    """Processes that are ready to apply one function."""

    @property
    def slots(self) -> int:
        """How many parts to have under way, so that none of the processes ever waits.

        Asked now and then while waiting, it notices when there are no processes any more.
        """

    def submit(self, part: Part) -> Future[Any]: ...


class Workers(Protocol):
    """Where the work on parts is done."""

    def start(self, function: Function, most: int) -> AbstractContextManager[Pool]:
        """Make ready for at most `most` parts. Leaving with an error drops what is under way."""


class LocalWorkers:
    """Processes of this machine, `count` of them (0: one per core); one works in this process."""

    def __init__(self, count: int = 0) -> None:
        self.count = count or cores()

    @contextmanager
    def start(self, function: Function, most: int) -> Iterator[Pool]:
        count = min(self.count, most)
        if count <= 1:
            yield _Here(function)
            return
        # Forked workers start in milliseconds; elsewhere than on Linux forking is not safe.
        method = "fork" if sys.platform == "linux" else "spawn"
        context = multiprocessing.get_context(method)
        with _no_threads_in_tokenizers():
            executor = ProcessPoolExecutor(count, context, _begin, (function,))
            try:
                yield _Processes(executor, 2 * count)
            except BrokenProcessPool:
                raise PeerError(
                    "a worker process was killed, perhaps for lack of memory",
                    "run the same command again, it goes on where it stopped; "
                    "a smaller data.workers needs less memory",
                ) from None
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)
                raise
            else:
                executor.shutdown()


def in_order(workers: Workers, function: Function, parts: Sequence[Part]) -> Iterator[Any]:
    """Apply `function` to the parts, ahead of the reader by a few parts, in their order."""
    with workers.start(function, len(parts)) as pool:
        running: deque[Future[Any]] = deque()
        for part in parts:
            running.append(pool.submit(part))
            while len(running) >= pool.slots:
                yield _result(pool, running.popleft())
        while running:
            yield _result(pool, running.popleft())


def _result(pool: Pool, future: Future[Any]) -> Any:
    while pool.slots and not futures.wait([future], 1.0).done:
        pass
    return future.result()


def first_in_order(workers: Workers, function: Function, parts: Sequence[Part]) -> Any:
    """As `in_order`, for a reader that stops early: use it inside `with`."""
    return closing(in_order(workers, function, parts))


class _Here:
    """A pool of this process alone."""

    slots = 1

    def __init__(self, function: Function) -> None:
        self._function = function

    def submit(self, part: Part) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(self._function(part))
        except Exception as error:
            done.set_exception(error)
        return done


class _Processes:
    def __init__(self, executor: ProcessPoolExecutor, slots: int) -> None:
        self._executor, self.slots = executor, slots

    def submit(self, part: Part) -> Future[Any]:
        return self._executor.submit(_apply, part)


@contextmanager
def _no_threads_in_tokenizers() -> Iterator[None]:
    """Keep `tokenizers` in forked workers from threads that did not survive the fork."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


_function: Function | None = None
"""In a worker: what it applies to each part. Set once, so that tasks carry only their part."""


def _begin(function: Function) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to act on
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _apply(part: Part) -> Any:
    assert _function is not None
    return _function(part)
