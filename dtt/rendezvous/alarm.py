"""What a rank tells the others when it fails, and what it hears of theirs.

A collective that a failed rank does not join ends late (NCCL) or with the address of a socket
(gloo). So the first rank that fails leaves its reason in the store of the launch, where all others
look once a second; they report it, and one that does not come back from a collective is ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from dtt.errors import DttError, LostRankError, OtherRankError
from dtt.machine import bounded
from dtt.rendezvous.room import Card, Room

PERIOD = 1.0
"""Seconds between two looks at the store."""
PATIENCE = 3 * PERIOD
"""Seconds that a rank which ends spends on the others."""
GRACE = 10.0
"""Seconds that a rank has to notice by itself that it has lost another one."""


class Alarm:
    """Begins to listen when it is made; `close` before the process group ends.

    `served`: the store is a launcher's, which deals with lost ranks by itself.
    """

    def __init__(self, room: Room, cards: tuple[Card, ...], served: bool) -> None:
        self._room, self._cards, self._served = room, cards, served
        self._closed = threading.Event()
        self._heard = ""
        self._thread = threading.Thread(target=self._listen, name="alarm", daemon=True)
        self._thread.start()

    @property
    def store(self) -> Store:
        """What the ranks of this launch share: looking at it waits for no other rank."""
        return self._room.store

    def close(self) -> None:
        """Stop listening; a rank that ends ends by itself."""
        self._closed.set()

    def ring(self, error: Exception) -> None:
        """Tell the others why this rank fails, unless another one was first."""
        with contextlib.suppress(TimeoutError, dist.DistError):  # rank 0 may have gone
            bounded(lambda: self._ring(error), PATIENCE)

    def _ring(self, error: Exception) -> None:
        what = str(error) if isinstance(error, DttError) else f"{type(error).__name__}: {error}"
        reason = json.dumps({"rank": self._room.card.rank, "what": what.splitlines()[0][:400]})
        store = self._room.store
        known = isinstance(error, OtherRankError)
        if known or store.compare_set("failed", "", reason).decode() != reason:
            if not self._heard:  # else it has been counted
                store.add("heard", 1)  # it ends for the same reason
            return
        self._linger()

    def _linger(self) -> None:
        """Keep the store, if it is this rank's, until the others have heard of the failure."""
        until = time.monotonic() + 2 * PERIOD
        while self._room.serves and time.monotonic() < until:
            if self._room.store.add("heard", 0) >= len(self._cards) - 1:
                return
            time.sleep(0.02)

    def lost(self) -> LostRankError:
        """Return the loss of another rank as an error, with its reason where it has left one."""
        if not self._heard:
            with contextlib.suppress(TimeoutError):
                bounded(self._look, PATIENCE)
        if not self._heard:
            return LostRankError(
                "another rank was lost", "see its messages; the same command goes on"
            )
        with contextlib.suppress(TimeoutError, dist.DistError):
            bounded(self._linger, PATIENCE)
        return LostRankError(self._heard, "the same command goes on")

    def _listen(self) -> None:
        while not self._heard:
            if self._closed.wait(PERIOD) or not self._look():
                return
        if not self._closed.wait(GRACE):
            print(f"dtt: error: {self.lost()}", file=sys.stderr, flush=True)
            os._exit(LostRankError.exit_code)

    def _look(self) -> bool:
        """Take up the reason of the first rank that failed, if any; False: there will be none."""
        store = self._room.store
        try:
            if not self._heard and store.check(["failed"]):
                first = json.loads(store.get("failed"))
                card = self._cards[first["rank"]]
                if card.rank != self._room.card.rank:  # which waits for the others to hear it
                    self._heard = f"rank {card.rank} on {card.host} failed: {first['what']}"
                    store.add("heard", 1)
        except dist.DistError:
            if self._served:
                return False
            # The store went with rank 0. If that ended well, so does this rank, before GRACE.
            self._heard = self._heard or f"rank 0 on {self._cards[0].host} was lost"
        return True
