"""What the ranks of a launch share in a store: their cards, their beats, and a reason to end."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from dtt.errors import ConfigError, DttError, OtherRankError, PeerError, RankError
from dtt.network import shown_interfaces

FIRST_WORD = 10.0
"""Seconds of waiting without a word; then one, and again after three times as long."""
BEAT = 1.0
"""Seconds between two signs of life of a waiting rank."""
LOST = 10.0
"""Seconds without one after which a rank is gone."""
LINGER = 1.0
"""Seconds that the rank that serves the store keeps it, when there is a reason to end."""


def home() -> str:
    """Return what ranks share that reach each other by the loopback interface."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/net"))
    return "/".join(parts)


@dataclass(frozen=True)
class Card:
    """Who a rank is, and where others reach it."""

    rank: int
    ranks: int
    launch: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    """What has to be the same on all ranks: versions, configuration."""
    device: str = ""
    """The identity of its GPU."""
    host: str = field(default_factory=socket.gethostname)
    home: str = field(default_factory=home)
    pid: int = field(default_factory=os.getpid)
    address: str = ""
    """Numeric, of the interface that it uses."""
    door: int = 0
    """The port where others can prove that they reach it."""
    networks: str = field(default_factory=shown_interfaces)
    """The interfaces of its host, for messages."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"


class Room:
    """The part of a store that belongs to one meeting, as the rank of `card` uses it."""

    def __init__(self, store: Store, token: str, card: Card, *, serves: bool, quiet: bool):
        self.store = PrefixStore(f"dtt/{token}", store)
        self.card, self.serves, self.quiet = card, serves, quiet
        self._beaten = 0.0
        self._seen: dict[int, tuple[bytes, float]] = {}

    # --- coming in ---

    def enter(self) -> bool:
        """Leave this rank's card; False if there is a card of that rank already."""
        card = json.dumps(asdict(self.card))
        if self.store.compare_set(f"rank/{self.card.rank}", "", card).decode() != card:
            return False
        self.store.set(f"beat/{self.card.rank}", "0")
        self.store.add("arrived", 1)
        return True

    def card_of(self, rank: int) -> Card:
        """Return the card that a rank has left."""
        return Card(**json.loads(self.store.get(f"rank/{rank}")))

    def arrived(self) -> int:
        """Return how many ranks have left a card."""
        return self.store.add("arrived", 0)

    def missing(self) -> list[int]:
        """Return the ranks that have not left a card."""
        return self._lacking("rank")

    def _lacking(self, kind: str) -> list[int]:
        return [rank for rank in range(self.card.ranks) if not self.store.check([f"{kind}/{rank}"])]

    def close(self, cards: Sequence[Card]) -> None:
        """Let the others know that all have come, and who they are."""
        self.store.set("complete", json.dumps([asdict(card) for card in cards]))

    def is_closed(self) -> bool:
        """Return whether all have come."""
        return self.store.check(["complete"])

    def cards(self) -> tuple[Card, ...]:
        """Return the cards of all, by rank, of a room that is closed."""
        return tuple(Card(**card) for card in json.loads(self.store.get("complete")))

    # --- reaching each other ---

    def link(self) -> None:
        """Let the others know that this rank has reached every host."""
        self.store.set(f"linked/{self.card.rank}", "1")
        self.store.add("linked", 1)

    def linked(self) -> int:
        """Return how many ranks have reached every host."""
        return self.store.add("linked", 0)

    def unlinked(self) -> list[int]:
        """Return the ranks that have not."""
        return self._lacking("linked")

    # --- signs of life ---

    def beat(self) -> None:
        """Give a sign of life, if the last one was a while ago."""
        if time.monotonic() - self._beaten > BEAT:
            self._beaten = time.monotonic()
            self.store.set(f"beat/{self.card.rank}", str(self._beaten))

    def lost(self) -> int | None:
        """Return a rank that came and has given no sign of life for a while, if there is one."""
        now = time.monotonic()
        if now - self._beaten < BEAT:
            return None
        self._beaten = now
        here = set(range(self.card.ranks)) - {self.card.rank, *self.missing()}
        for rank in here:
            beat = self.store.get(f"beat/{rank}") if self.store.check([f"beat/{rank}"]) else b""
            if self._seen.get(rank, (None, 0.0))[0] != beat:
                self._seen[rank] = (beat, now)
            elif now - self._seen[rank][1] > LOST:
                return rank
        return None

    # --- reasons to end ---

    def has_ended(self) -> bool:
        """Return whether there is a reason to end."""
        return self.store.check(["problem"])

    def heed(self) -> None:
        """Raise the reason to end that another rank has left, if there is one."""
        if self.has_ended():
            reason = json.loads(self.store.get("problem"))
            self.store.add("heeded", 1)
            self._raise(reason)

    def fail(self, error: DttError) -> NoReturn:
        """Leave a reason to end for the others, and raise it; or theirs, which was there first."""
        mine = _reason(error, self.card.rank)
        first = self.store.compare_set("problem", "", mine).decode()
        if first != mine:
            self._raise(json.loads(first))
        if self.serves:
            until = time.monotonic() + LINGER
            while self.store.add("heeded", 0) < self.arrived() - 1 and time.monotonic() < until:
                time.sleep(0.01)
        raise error

    def leave_reason(self, error: DttError) -> None:
        """As `fail`, for one that raises something else; the store may be gone already."""
        with contextlib.suppress(dist.DistError):
            self.store.compare_set("problem", "", _reason(error, self.card.rank))

    def _raise(self, reason: dict[str, Any]) -> NoReturn:
        """The reason of another rank: said once on each host, as not all see all output."""
        if self.quiet:
            raise OtherRankError(reason["code"])
        kind = RankError if reason["code"] == ConfigError.exit_code else PeerError
        raise kind(reason["what"], reason["fix"])


def _reason(error: DttError, rank: int) -> str:
    parts = {"code": error.exit_code, "what": error.what, "fix": error.fix, "rank": rank}
    return json.dumps(parts)


class Clock:
    """A time limit, pauses that grow, and a word now and then for who watches."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.begun = seconds, time.monotonic()
        self.paused = self.begun
        """When it was last asked for a pause, or something went on."""
        self._next = FIRST_WORD

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begun

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.elapsed)

    @property
    def over(self) -> float:
        return max(0.0, self.elapsed - self.seconds)

    def go_on(self) -> None:
        """Note that something went on."""
        self.paused = time.monotonic()

    def pause(self, what: Callable[[], str] | None, longest: float = 0.05) -> None:
        """Sleep for a moment; after some time without success say `what` is waited for."""
        if what is not None and self.elapsed > self._next:
            self._next *= 3
            said = f"dtt: {what()} ({self.elapsed:.0f} s of {self.seconds:.0f} s)"
            print(said, file=sys.stderr, flush=True)
        self.go_on()
        interval = min(max(0.001, self.elapsed / 10), longest)  # late by a tenth at most
        time.sleep(min(interval, self.left or interval))


def difference(cards: Sequence[Card]) -> RankError | None:
    """Return what keeps these ranks from working together, if anything does."""
    first = cards[0]
    for name, value in first.facts.items():
        for card in cards:
            if card.facts.get(name) != value:
                return RankError(
                    f"ranks differ in their {name}: {value} on rank 0 ({first.host}), "
                    f"{card.facts.get(name)} on rank {card.rank} ({card.host})",
                    "start all of them from one environment, with the same command",
                )
    devices: dict[str, Card] = {}
    for card in cards:
        if card.device and (other := devices.setdefault(card.device, card)) is not card:
            return RankError(
                f"ranks {other.rank} and {card.rank} on {card.host} have the same GPU",
                "start at most one rank per GPU, each with a LOCAL_RANK of its own",
            )
    return None


def names_of(ranks: Sequence[int], total: int, nodes: Sequence[str], local_ranks: int) -> str:
    """Return `ranks 2-3 of 4 (node2)`: by node where known, or by torchrun's node rank."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = _some([f"{a}" if a == b else f"{a}-{b}" for a, b in spans])
    text = f"rank{'s' * (len(ranks) > 1)} {shown} of {total}"
    if len(nodes) == total:
        return f"{text} ({_some(list(dict.fromkeys(nodes[rank] for rank in ranks)))})"
    if 1 < local_ranks < total and total % local_ranks == 0:
        theirs = dict.fromkeys(str(rank // local_ranks) for rank in ranks)
        return f"{text} (node rank{'s' * (len(theirs) > 1)} {_some(list(theirs))})"
    return text


def _some(words: list[str], most: int = 8) -> str:
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest} more" if rest > 0 else "")
