"""How the launchers of several machines meet, and what they tell each other during a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from dtt.errors import EXIT_DONE, PeerError
from dtt.launch.elastic_verdict import GOOD
from dtt.machine import free_port

T = TypeVar("T")

SETTINGS = {
    "join_timeout": 600,
    "last_call_timeout": 3,
    "keep_alive_interval": 2,
    "keep_alive_max_attempt": 6,
    "heartbeat_timeout": 15,
    "read_timeout": 15,
}
"""Seconds for torch's rendezvous (--rdzv-conf overrides them).

A machine is given up after keep_alive_interval x keep_alive_max_attempt without a word, 12 s and
not 15: a cut of the network for 4 s does no harm (TCP is silent for 6 s then), and clocks may
differ by less than that. A word that takes longer than heartbeat_timeout is not said at all. With
MIN:MAX machines a start waits last_call_timeout for more than MIN, 3 s and not 30, because one that
comes later is let in by a restart that repeats no step.
read_timeout is how long a launcher can be deaf to signals when the network is cut.
"""
PAUSE = 1.0
"""Seconds between two questions to the store: at most one a second from each machine."""
PARTING = 10.0
"""Seconds that a failed run's launchers wait for each other, so that all of them learn of it."""
FINISHING = 300.0
"""Seconds that they wait after a run that ended well: another one's ranks may be still saving."""

LAST_WORD = 0.5
"""Seconds after its last word that a launcher stays: the others' last words may need its store."""


class OneMachine(RendezvousHandler):
    """A meeting of one: no socket, no thread and no waiting."""

    def __init__(self) -> None:
        self._run_id = f"{time.time_ns():x}"  # all of its workers have to be told the same

    def get_backend(self) -> str:
        return "one machine"

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo("127.0.0.1", free_port()))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


class Ended(Exception):  # noqa: N818
    """The launcher of another machine has ended the run, with `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Nodes:
    """The machines of a run as one of their launchers sees them.

    What they tell each other is kept in the store of one round, that is from one start of the
    workers to the next: the code with which the run ends, who has left, and that the workers stop
    in order to let a machine in. A store that cannot be reached tells nothing: workers that run do
    not need it.
    """

    def __init__(self, handler: RendezvousHandler, endpoint: str = "") -> None:
        self._handler, self._endpoint = handler, endpoint
        self._store: Any = HashStore()
        self._count = 1
        self._asked_at = 0.0

    def meet(self, join: Callable[[], tuple[Any, int]]) -> None:
        """Have `join` meet the others; it returns the store and how many machines there are.

        Raises Ended if the run has ended elsewhere, PeerError if too few came.
        """
        try:
            self._store, self._count = join()
        except (RendezvousClosedError, RendezvousGracefulExitError):
            code = self.ended()
            raise Ended(PeerError.exit_code if code in (None, EXIT_DONE) else code) from None
        except RendezvousTimeoutError:
            raise PeerError(
                f"too few machines came within the join_timeout: {', '.join(self.names())}",
                "start the launcher on the others, too; the same command goes on",
            ) from None
        except (RendezvousError, RuntimeError) as error:
            raise PeerError(
                f"{self._endpoint}, where the machines meet, cannot be reached any more",
                "start the launchers again, on that machine or with another --rdzv-endpoint",
            ) from error

    def names(self) -> list[str]:
        """Return the machines that are in the present round."""
        state: Any = getattr(self._handler, "_state_holder", None)
        return sorted(node.addr for node in state.state.participants) if state else ["localhost"]

    def loss(self) -> str:
        """Say what is missing, if something is."""
        handler: Any = self._handler
        if handler._this_node not in handler._state_holder.state.participants:
            return "the other machines have not heard of this one for too long"
        return f"lost a machine; left: {', '.join(self.names())}"

    def due(self) -> bool:
        """Whether it is time to ask for news again."""
        now = time.monotonic()
        if self._count == 1 and isinstance(self._handler, OneMachine):
            return False
        if now < self._asked_at + PAUSE:
            return False
        self._asked_at = now
        return True

    def waiting(self) -> bool:
        """Whether a machine waits to be let in."""
        return bool(self._ask(self._handler.num_nodes_waiting))

    def missing(self) -> bool:
        """Whether a machine of this round has not been heard of for too long; call after waiting.

        torch's launcher does not look: its ranks notice only where the machine still closed its
        connections, and after the collectives' timeout where it lost power.
        """
        state: Any = getattr(self._handler, "_state_holder", None)
        return state is not None and len(state.state.participants) < self._count

    def regroup(self) -> None:
        """Tell the others that the workers stop to let a machine in; call before they do."""
        self._ask(lambda: self._store.set("dtt/regroup", "yes"))

    def regrouping(self) -> bool:
        """Whether a launcher has said so."""
        return bool(self._ask(lambda: self._store.check(["dtt/regroup"])))

    def ended(self) -> int | None:
        """Return the code with which a launcher has ended the run, None if none has."""
        if not self._ask(lambda: self._store.check(["dtt/end"])):
            return None
        text = self._ask(lambda: self._store.get("dtt/end"))
        return None if text is None else int(text)

    def part(self, code: int) -> bool:
        """Say with which code the run ends here, and wait for the others to end it, too.

        False if they begin again instead.
        """
        self._ask(lambda: self._store.compare_set("dtt/end", "", str(code)))
        left = self._ask(lambda: self._store.add("dtt/left", 1))
        deadline = time.monotonic() + (FINISHING if code in GOOD else PARTING)
        while left is not None and left < self._count and time.monotonic() < deadline:
            time.sleep(0.1)
            left = self._ask(lambda: self._store.add("dtt/left", 0))
            if self.due() and (self.waiting() or self.missing()):
                return False
        return True

    def close(self) -> None:
        """Let nobody join any more."""
        self._ask(self._handler.shutdown)
        if self._count > 1:
            time.sleep(LAST_WORD)

    def _ask(self, question: Callable[[], T]) -> T | None:
        try:
            return question()
        except (RendezvousError, RuntimeError):
            return None
