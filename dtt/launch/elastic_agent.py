"""The launcher of a machine's workers: it starts them, and starts them again after a loss.

PyTorch's elastic agent finds ranks and starts processes; when to start again, what signals and exit
codes mean, and how a run ends are decided here.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import Worker, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

from dtt.errors import EXIT_DONE, EXIT_PREEMPTED, ConfigError, DttError, PeerError
from dtt.launch.elastic_nodes import Ended, Nodes, OneMachine
from dtt.launch.elastic_verdict import GOOD, Lost, Restarts, judge
from dtt.launch.elastic_worker import Task, work
from dtt.runs import scan
from dtt.training.batching import require_layout
from dtt.training.folder import run_folder
from dtt.training.preemption import SIGNALS

START_METHOD = "fork" if sys.platform == "linux" else "spawn"
"""Forked workers share the imports of this process, which must not have used OpenMP or CUDA."""
GRACE = 10.0
"""Seconds that the other workers have to end by themselves when one has failed."""
ABANDON = 2.0
"""Seconds that they have when another machine is gone: they have waited for it already."""
PATIENCE = 900.0
"""Seconds that workers have to save and leave when they are asked to: more than a checkpoint of
many ranks may take (dtt.training.ranks.PATIENCE). Schedulers have a limit of their own."""
FOREVER = float("inf")
INTERVAL = 0.1
"""Seconds between two looks at signals; the end of a worker is seen at once."""

# Not this process's: set before a thread starts, they hold for all that dtt starts from here.
ENVIRONMENT = {
    # Otherwise a restart reads the addresses of dead workers from the store of the start before.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    # torch's launcher would take signals that are handled here; this one ends all at once, by it.
    "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT",
}


class Unlogged(LogsSpecs):
    """Workers write to this process's stdout and stderr, and no folder is made for their logs."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        none = dict.fromkeys(envs, "")
        return LogsDest(none, none, {}, {}, none)

    @property
    def root_log_dir(self) -> str:
        return ""


class Agent(LocalElasticAgent):
    """Starts the workers of one machine, and again after a loss, until the run ends.

    Asked to stop by SIGTERM, SIGUSR1 or SIGINT it passes that on, and the workers save; a second
    SIGINT ends all at once. At most one start has workers at any time.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        logs: LogsSpecs,
        task: Task,
        most_nodes: int = 1,
        endpoint: str = "",
    ) -> None:
        super().__init__(spec, logs, START_METHOD)
        os.environ.update(ENVIRONMENT)
        for name in ("torch.distributed.elastic", "torch.distributed.run"):
            logging.getLogger(name).propagate = False  # this class says what there is to say
            logging.getLogger(name).addHandler(logging.NullHandler())
        self._task, self._most_nodes = task, most_nodes
        self._nodes = Nodes(spec.rdzv_handler, endpoint)
        self._run = run_folder(task.config)
        self._old = self._found_checkpoints() if task.fresh else set()
        self._command = "the same command" + " without --fresh" * task.fresh
        self._restarts = Restarts(self._run, spec.max_restarts, self._command)
        self._starts = 0
        self._asked: signal.Signals | None = None
        self._asked_at = FOREVER
        self._meeting = False

    def train(self) -> int:
        """Return the run's exit code when it has ended on all machines.

        Raises PeerError for a loss after which there is no restart, NoProgressError after too many
        of them, KeyboardInterrupt at a second SIGINT.
        """
        try:
            with self._signals():
                while True:
                    code = self._start_and_watch()
                    if self._nodes.part(code) or code != EXIT_DONE:
                        break
        except Ended as end:
            code = end.code
        except DttError as error:
            self._nodes.part(error.exit_code)
            self._nodes.close()
            raise
        finally:
            self._shutdown()
        self._nodes.close()
        return code

    def _start_and_watch(self) -> int:
        """Start workers until none are lost, and return what their exit codes amount to."""
        while True:
            self._meet_and_start()
            outcome = self._watch()
            if outcome == EXIT_PREEMPTED and self._asked is None and self._nodes.regrouping():
                say("another machine joins the run, which goes on from here")
                continue
            if isinstance(outcome, int):
                return outcome
            ended = self._nodes.ended()
            if ended is not None and ended not in GOOD:
                raise Ended(ended)
            if self._asked is not None:
                raise PeerError(outcome.what, f"{self._command} goes on")
            self._restarts.count(outcome, say)
            if outcome.busy:
                time.sleep(GRACE)

    def _meet_and_start(self) -> None:
        self._shutdown()
        self._nodes.meet(self._join)
        self._start_workers(self._worker_group)
        self._starts += 1

    def _join(self) -> tuple[Any, int]:
        """Find this round's ranks; a signal ends it, since there is nothing to save."""
        if self._asked is not None:
            raise SystemExit(EXIT_PREEMPTED)
        self._meeting = True
        try:
            self._rendezvous(self._worker_group)
        finally:
            self._meeting = False
        return self._worker_group.store, self._worker_group.group_world_size or 1

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        """Give ranks to workers; on fewer machines than there may be, to as many as can divide.

        Those without a rank wait for the next start, in place of a run that could not go on.
        """
        workers = super()._assign_worker_ranks(store, group_rank, group_world_size, spec)
        ranks = found = workers[0].world_size
        while group_world_size < self._most_nodes and ranks > 1 and not self._fits(ranks):
            ranks -= 1
        if ranks < found:
            if group_rank == 0:
                say(f"{found} ranks are there, and {ranks} can divide the batch; the rest wait")
            workers = [worker for worker in workers if worker.global_rank < ranks]
            for worker in workers:
                worker.world_size = worker.role_world_size = ranks
        return workers

    def _fits(self, ranks: int) -> bool:
        try:
            require_layout(self._task.config, ranks)
        except ConfigError:
            return False
        return True

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if not worker_group.workers:
            self._pcontext = None
            return {}
        # --fresh holds until the old run is removed; later it would remove this one's progress.
        fresh = self._task.fresh and (
            not self._starts or bool(self._old & self._found_checkpoints())
        )
        spoken = get_context(START_METHOD).Value("b", 0)
        worker_group.spec.args = (replace(self._task, fresh=fresh), spoken)
        worker_group.spec.entrypoint = work
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return super()._start_workers(worker_group)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _found_checkpoints(self) -> set[tuple[str, int]]:
        return {(path.name, path.stat().st_ino) for path in scan(self._run / "checkpoints")}

    def _watch(self) -> int | Lost:
        """Wait for this machine's workers to end, and leave those that do not."""
        codes: dict[int, int] = {}
        told: signal.Signals | None = None
        deadline = gone_at = FOREVER
        processes = self._processes()
        while processes or not codes:
            wait([process.sentinel for process in processes.values()], INTERVAL)
            for rank, process in list(processes.items()):
                if process.exitcode is not None:
                    codes[rank] = process.exitcode
                    del processes[rank]
            if not set(codes.values()) <= set(GOOD):
                deadline = min(deadline, time.monotonic() + GRACE)
            if self._asked not in (None, told):
                told = self._asked
                self._tell(processes, told)
                deadline = min(deadline, self._asked_at + PATIENCE)
            if self._nodes.due():
                ended = self._hear(processes)
                if ended is not None and not processes:
                    return ended
                gone_at = min(gone_at, time.monotonic()) if self._nodes.missing() else FOREVER
            if time.monotonic() > min(deadline, gone_at + ABANDON):
                break
            if self._asked is not None and not processes and not codes:
                raise SystemExit(EXIT_PREEMPTED)  # a machine that only waits leaves alone
        if set(codes.values()) <= set(GOOD) and (processes or not codes):
            late = "the ranks did not save and leave in time"
            return Lost(self._nodes.loss() if gone_at < FOREVER else late)
        return judge(codes, self._where(), again=self._starts > 1)

    def _hear(self, processes: dict[int, Any]) -> int | None:
        """Hear what the other machines do; return the code with which they ended the run, if so."""
        if (ended := self._nodes.ended()) is not None:
            return ended  # workers that still run end by themselves, or lose the others
        if self._nodes.waiting() and not self._nodes.missing() and not self._nodes.regrouping():
            self._nodes.regroup()
            self._tell(processes, signal.SIGTERM)
        if not processes and self._nodes.regrouping():
            return EXIT_PREEMPTED
        return None

    def _processes(self) -> dict[int, Any]:
        """Return this machine's processes by rank."""
        context: Any = self._pcontext
        if context is None:
            return {}
        ranks = [worker.global_rank for worker in self._worker_group.workers]
        return dict(zip(ranks, context._pc.processes, strict=True))

    def _tell(self, processes: dict[int, Any], number: signal.Signals | None) -> None:
        # A terminal sends SIGINT to the workers, too, and their second one means at once.
        number = signal.SIGTERM if number in (None, signal.SIGINT) else number
        for process in processes.values():
            if process.is_alive():
                os.kill(process.pid, number)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 30) -> None:
        """End what workers are left: they had their time."""
        if self._pcontext is not None:
            self._pcontext.close(signal.SIGKILL, timeout)

    def _where(self) -> str:
        several = not isinstance(self._worker_group.spec.rdzv_handler, OneMachine)
        return socket.gethostname() if several else ""

    @contextmanager
    def _signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = signal.Signals(number)
        self._asked_at = min(self._asked_at, time.monotonic())
        if self._meeting:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(EXIT_PREEMPTED)


def say(text: str) -> None:
    """Say something about the run's workers, in a line on stderr."""
    print(f"dtt train: {text}", file=sys.stderr, flush=True)
