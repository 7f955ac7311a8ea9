"""The parts of a corpus on the workers of a Dask cluster, or of one that is started here.

For machines with neither MPI nor Slurm. The workers need the same dtt and the same shared folders
as this process; a worker that dies is replaced by the others (docs.dask.org, "Resilience").
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from dtt.data.preparation.workers import Function, Pool
from dtt.data.sources import Part
from dtt.errors import ConfigError, DataError, PeerError
from dtt.machine import cores
from dtt.version import __version__

ARRIVAL = 30.0
"""Seconds to wait for the scheduler, and for a worker when there is none."""


class DaskWorkers:
    """The workers of a scheduler (`tcp://HOST:8786`), or of `local`: `count` processes here.

    Inside `with`. ConfigError without the package or with another dtt on a worker; PeerError when
    the scheduler or its workers do not answer.
    """

    def __init__(self, address: str, count: int = 0) -> None:
        try:
            import distributed
        except ModuleNotFoundError:
            raise ConfigError("--dask needs the package dask", "pip install 'dtt[dask]'") from None
        for name in logging.root.manager.loggerDict:
            if name.split(".")[0] == "distributed":
                logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        self._distributed: Any = distributed
        self._address, self._count = address, count or cores()
        self._cluster: Any = None
        self._client: Any = None

    def __enter__(self) -> DaskWorkers:
        address: Any = self._address
        if address == "local":
            address = self._cluster = self._distributed.LocalCluster(
                n_workers=self._count,
                threads_per_worker=1,
                dashboard_address=None,
                silence_logs=logging.CRITICAL,
            )
        try:
            self._client = self._distributed.Client(address, timeout=ARRIVAL)
            self._client.wait_for_workers(1, timeout=ARRIVAL)
        except (OSError, ValueError, asyncio.TimeoutError) as error:
            self._close()
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PeerError(
                f"--dask {self._address}: no scheduler with workers answers: {reason}",
                "start `dask scheduler` and, on each machine, `dask worker ADDRESS --nthreads 1`",
            ) from None
        self._check_versions()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        for open_one in (self._client, self._cluster):
            if open_one is not None:
                open_one.close()

    def _check_versions(self) -> None:
        for worker, version in self._client.run(_version, on_error="return").items():
            if version != __version__:
                has = version if isinstance(version, str) else "none that can be imported"
                self._close()
                raise ConfigError(
                    f"the Dask worker {worker} has another dtt ({has}) than {__version__} here",
                    "install the same dtt on all workers",
                )

    @contextmanager
    def start(self, function: Function, most: int) -> Iterator[Pool]:
        """Send the function to all workers once, and make ready to apply it."""
        try:
            # A task's result, not scattered data, which would be lost with the last of its holders.
            packed = self._client.submit(bytes, pickle.dumps(function), pure=False)
            yield _Cluster(self._client, packed)
        except self._distributed.scheduler.KilledWorker:
            raise PeerError(
                "a part killed the Dask workers that worked on it, perhaps for lack of memory",
                "give the workers more memory or fewer threads, and run the same command again",
            ) from None
        except CancelledError:
            raise PeerError(
                f"the Dask scheduler {self._address} has gone",
                "start it again and run the same command, it goes on where it stopped",
            ) from None


class _Cluster:
    def __init__(self, client: Any, packed: Any) -> None:
        self._client, self._packed = client, packed
        self._executor = client.get_executor(pure=False)
        self._key = secrets.token_hex(6)
        self._asked, self._slots = 0.0, 1
        self._had_some = time.monotonic()

    @property
    def slots(self) -> int:
        """Twice the threads of the workers there are; PeerError if all are gone."""
        now = time.monotonic()
        if now - self._asked > 1:
            self._asked, threads = now, sum(self._client.nthreads().values())
            if threads:
                self._had_some = now
            elif now - self._had_some > ARRIVAL:
                raise PeerError(
                    f"the Dask scheduler has had no workers for {ARRIVAL:.0f} s",
                    "start some and run the same command, it goes on where it stopped",
                )
            self._slots = max(1, 2 * threads)
        return self._slots

    def submit(self, part: Part) -> Future[Any]:
        return self._executor.submit(_apply, self._packed, self._key, os.getcwd(), part)


_functions = threading.local()
"""On a worker: the function of each thread, which may count things while it works."""


def _apply(packed: bytes, key: str, folder: str, part: Part) -> Any:
    """On a worker: apply the function, in the folder where the command was given."""
    if getattr(_functions, "key", None) != key:
        _functions.key, _functions.function = key, pickle.loads(packed)
    if Path.cwd() != Path(folder):
        try:
            os.chdir(folder)
        except OSError:
            raise DataError(
                f"the Dask worker on {socket.gethostname()} does not see the folder {folder}",
                "give the command in a folder that all workers share",
            ) from None
    return _functions.function(part)


def _version() -> str:
    return __version__
