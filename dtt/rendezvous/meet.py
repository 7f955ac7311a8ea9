"""The meeting of all ranks of a launch, before they become a process group: never a silent wait.

Rank 0 serves a key-value store at the meeting point (or takes that of torchrun's agent) and opens
a room in it: a prefix of its own, so that what dead ranks left in a store is never read. Every
rank leaves its card there (who and where it is) and waits. When all have come, rank 0 compares the
cards and hands them out. Where ranks are on several hosts, each then connects to a rank of every
other host, to prove that they reach each other and not only rank 0.

Whoever finds that it cannot go on leaves the reason in the room, and all end with it. Waiting is
by polling, since the store's own waits let no signal through.
"""

from __future__ import annotations

import contextlib
import errno
import json
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from dtt import network
from dtt.errors import PeerError, RankError
from dtt.machine import Task, bounded, free_port
from dtt.place import Place, Point
from dtt.rendezvous import pmi
from dtt.rendezvous.room import Card, Clock, Room, difference, names_of

PATIENCE = 30.0
"""Seconds to wait for a taken port: the run before may be about to end."""
CONNECTING = 5.0
"""Seconds for one attempt to connect; a host that is there answers in thousandths."""
SILENCE = 10.0
"""Seconds that a question to the store may take."""
STORE = timedelta(minutes=5)
"""What the store waits for a key that has to come, as torch's default."""
GREETING = struct.pack("=BIB", 0, 0x3C85F7CE, 13) + b"\r\n\r\n"
"""What a TCPStore says first (c10d's VALIDATE and PING) with a number that it gets back, and that
ends a line for what is no store: torch's client prints pages about such a one."""
ROUND = "dtt/round"
"""Where the newest room of a store is named."""


@dataclass(frozen=True)
class Met:
    """What a rank has of the meeting: the room, whose store is this launch's, and all cards."""

    room: Room
    cards: tuple[Card, ...]

    @property
    def is_one_host(self) -> bool:
        return len({card.home for card in self.cards}) == 1


def meet(place: Place, point: Point, card: Card, seconds: float) -> Met:
    """Meet all other ranks of the launch.

    PeerError if some do not come within `seconds` or go away again; RankError if they do not fit
    together. A signal handler that raises ends it at once, and tells the others.
    """
    with network.listen(0) as door:
        card = replace(card, launch=point.launch, door=door.getsockname()[1])
        meeting = _Meeting(place, point, card, Clock(seconds))
        # In a thread of its own, as the store and the resolver of names neither let signals
        # through nor keep time when the network fails in the midst of an answer.
        task = Task(meeting.hold)
        try:
            while not task.wait(SILENCE / 10):
                meeting.refuse_silence()
        except (KeyboardInterrupt, SystemExit):
            with contextlib.suppress(TimeoutError):
                bounded(meeting.excuse, 1.0)
            raise
        return task.result()


class _Meeting:
    """One rank's part in the meeting."""

    def __init__(self, place: Place, point: Point, card: Card, clock: Clock) -> None:
        self.place, self.point, self.card, self.clock = place, point, card, clock
        self.room: Room | None = None
        self.presides = place.rank == 0
        self.serves = self.presides and not point.served
        self.foreign = False  # whether there was another launch's room

    def hold(self) -> Met:
        try:
            if not self.point.address:
                self._ask_mpirun()
            met = self._preside() if self.presides else self._attend()
            if not met.is_one_host:
                self._prove_links(met)
            return met
        except dist.DistError as error:
            what = f"rank 0 at {self._where} ended while {self.card} waited there for the others"
            raise PeerError(what, "see the messages of rank 0") from error

    def refuse_silence(self) -> None:
        """Raise PeerError if the store has not answered for long."""
        if self.room is not None and time.monotonic() - self.clock.paused > SILENCE:
            raise PeerError(
                f"rank 0 at {self._where} stopped answering while {self.card} waited there",
                "look at its host and at the network between them",
            )

    def excuse(self) -> None:
        """Tell the others that this rank goes away, if it can."""
        if self.room is not None and not self.serves:
            stopped = PeerError(f"{self.card} was stopped while the ranks met", "start again")
            self.room.leave_reason(stopped)

    @property
    def _where(self) -> str:
        return f"{self.point.address}:{self.point.port}"

    def _ask_mpirun(self) -> None:
        """Learn the meeting point from mpirun: rank 0 chooses a free port and tells the others."""
        value = ""
        if self.presides:
            one_host = self.place.local_ranks == self.place.ranks
            host = "127.0.0.1" if one_host else self.point.host or self.card.host
            value = f"{host}:{free_port()}"
        launch, value = pmi.share(self.point.descriptor, value, self.clock.left)
        host, _, port = value.rpartition(":")
        self.point = replace(self.point, address=host, port=int(port))
        self.card = replace(self.card, launch=launch)

    def _open(self, store: Store, token: str) -> Room:
        quiet = self.place.local_rank > 0
        return Room(store, token, self.card, serves=self.serves, quiet=quiet)

    # --- rank 0 ---

    def _preside(self) -> Met:
        store = self._serve() if self.serves else self._reach()
        token = secrets.token_hex(8)
        room = self.room = self._open(store, token)
        room.enter()
        store.set(ROUND, json.dumps({"token": token, "card": asdict(self.card)}))
        while room.arrived() < self.place.ranks:
            room.heed()
            if (lost := room.lost()) is not None:
                what = f"{room.card_of(lost)} was lost while the ranks met"
                room.fail(PeerError(what, "see its messages"))
            self._wait(room)
        cards = self._placed([room.card_of(rank) for rank in range(self.place.ranks)])
        if mismatch := difference(cards):
            room.fail(mismatch)
        room.close(cards)
        return Met(room, tuple(cards))

    def _serve(self) -> Store:
        """Open the store; PeerError if its port stays taken."""
        port, patience = self.point.port, min(PATIENCE, self.clock.left)
        while True:
            try:
                listener = network.listen(port)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise RankError(
                        f"rank 0 may not listen at port {port} of {self.card.host} "
                        f"({(error.strerror or str(error)).lower()})",
                        "set MASTER_PORT to another one, above 1023",
                    ) from None
                who = network.holder(port) or "another process"
                taken = f"port {port} of {self.card.host} is taken by {who}"
                if self.clock.elapsed > patience:
                    fix = "end it, or set MASTER_PORT to a free port, the same for all ranks"
                    raise PeerError(taken, fix) from None
                self.clock.pause(lambda: f"waiting: {taken}", 0.5)  # noqa: B023
        # Not waiting for the others: that is done here, by name and with a time limit.
        return TCPStore(
            "127.0.0.1", port, None, True, STORE, False, master_listen_fd=listener.detach()
        )

    def _placed(self, cards: list[Card]) -> list[Card]:
        """The cards, where no rank that others have to reach is at an address of loopback."""
        here = cards[0].home
        foreign = next((card for card in cards if card.home != here), None)
        if foreign is None:
            return cards
        own = network.source_address(foreign.address)

        def lacks(card: Card) -> bool:
            return card.home == here and (not card.address or network.is_loopback(card.address))

        return [replace(card, address=own) if lacks(card) else card for card in cards]

    def _doubt(self) -> str:
        """What makes it likely that the others look for rank 0 elsewhere; empty: nothing does."""
        host, here = self.point.address, self.card.host
        if not self.presides:
            return ""
        try:
            addresses = network.resolve(host, self.point.port, CONNECTING)
        except OSError:
            if "SLURM" in self.point.source and network.slurm_address(host) != host:
                return ""  # where the others ask Slurm as well
            return f" ({here}, where rank 0 is, cannot resolve {host})"
        if not any(map(network.is_own, addresses)):
            has = network.shown_interfaces()
            return f" ({host} is no address of {here}, where rank 0 is: it has {has})"
        if all(map(network.is_loopback, addresses)) and self.place.local_ranks < self.place.ranks:
            means = "" if host == addresses[0] else f"{host} is "
            return f" ({means}{addresses[0]}, where no other host can reach {here})"
        return ""

    # --- the other ranks ---

    def _attend(self) -> Met:
        """Find the room of this launch and wait there for the others."""
        while True:
            if not self.clock.left:
                self._refuse_foreign()
            store = self._reach()
            try:
                if met := self._follow(store):
                    return met
            except dist.DistError:
                if self.room is not None:
                    raise
            self.foreign = True
            self.clock.pause(lambda: f"waiting: another launch holds {self._where}", 0.5)

    def _refuse_foreign(self) -> None:
        if self.foreign:
            raise PeerError(
                f"another launch holds {self._where}, where {self.card} looks for its own",
                "end that one, or set MASTER_PORT to a free port, the same for all ranks",
            )

    def _reach(self) -> Store:
        """Connect to the store; PeerError, with the reason, if that takes too long."""
        while True:
            try:
                return self._connect()
            except OSError as error:
                what, fix = network.explain(error, self.point.address, self.point.port)
                if isinstance(error, socket.gaierror) and "SLURM" in self.point.source:
                    known = network.slurm_address(self.point.address)
                    self.point = replace(self.point, address=known)
            except dist.DistError:
                what = f"what listens at {self._where} is no store of ranks"
                fix = "set MASTER_ADDR to rank 0's host and MASTER_PORT to a free port of it"
            if not self.clock.left:
                self._refuse_foreign()
                raise PeerError(f"rank {self.place.rank} did not find rank 0: {what}", fix)
            waiting = f"rank {self.place.rank} waits for rank 0: {what} [{self.point.source}]"
            quiet = self.place.local_rank > 0
            self.clock.pause(None if quiet else lambda: waiting, 0.5)  # noqa: B023

    def _connect(self) -> Store:
        host, port = self.point.address, self.point.port
        seconds = max(0.5, min(CONNECTING, self.clock.left))
        mine, _, answer = network.reach(host, port, seconds, GREETING)
        if answer and answer != GREETING[-len(answer) :]:
            raise dist.DistError("no store")
        self.card = replace(self.card, address=self.card.address or mine)
        try:
            return bounded(lambda: TCPStore(host, port, None, False, STORE, False), seconds)
        except TimeoutError:  # it waits for ever for the answers of what is no store
            raise dist.DistError("no answer") from None

    def _follow(self, store: Store) -> Met | None:
        """Wait in the newest room of `store`; None: it is another launch's."""
        token = ""
        while True:
            heading = json.loads(store.get(ROUND)) if store.check([ROUND]) else None
            if heading is not None and heading["token"] != token:
                token, chair = heading["token"], Card(**heading["card"])
                if chair.launch != self.card.launch:
                    return None
                if not self._come_into(self._open(store, token), chair):
                    return None
            if self.room is not None:
                self.room.heed()
                if self.room.is_closed():
                    return Met(self.room, self.room.cards())
                self.room.beat()
            self._wait(self.room)

    def _come_into(self, room: Room, chair: Card) -> bool:
        """Enter a room, if nobody has this rank's place in it; False: it is another launch's."""
        if self.point.served and room.has_ended():
            self.room = None
            return True
        self._refuse_other_size(room, chair)
        self.room = room if room.enter() else None
        if self.room is None and not self.point.served:
            if room.is_closed():
                return False
            self._refuse_double(room)
        # torchrun keeps one store: without a room, that one is of before a restart.
        return True

    def _refuse_other_size(self, room: Room, chair: Card) -> None:
        if chair.ranks != self.card.ranks:
            room.fail(
                RankError(
                    f"{self.card} is one of {self.card.ranks} ranks, but {chair} one of "
                    f"{chair.ranks}",
                    "start all with the same number of ranks: WORLD_SIZE, --nnodes or -n",
                )
            )

    def _refuse_double(self, room: Room) -> None:
        raise RankError(
            f"{room.card_of(self.card.rank)} is there already, and {self.card} came as well",
            "start each rank once, with a RANK of its own; for a second launch set MASTER_PORT to "
            "a free port",
        )

    # --- all ranks ---

    def _wait(self, room: Room | None) -> None:
        """Pause; PeerError, on all ranks, when the time is over."""
        # Rank 0 knows most about what keeps others away: it has the first word.
        if self.clock.left or (room is not None and not self.presides and self.clock.over < 1.0):
            says = self.presides or (room is None and self.place.local_rank == 0)
            waiting = lambda: f"waiting for {self._absent(room)} at {self._where}{self._doubt()}"  # noqa: E731
            self.clock.pause(waiting if says else None)
            return
        error = PeerError(
            f"{self._absent(room)} did not come to {self._where} within "
            f"{self.clock.seconds:.0f} s{self._doubt()}",
            "look at their output and at their nodes, or give them more time with "
            "--parallel.rendezvous_timeout",
        )
        if room is None:
            raise error
        room.fail(error)

    def _absent(self, room: Room | None) -> str:
        return self._names([0] if room is None else room.missing())

    def _names(self, ranks: Sequence[int]) -> str:
        return names_of(ranks, self.place.ranks, self.point.nodes, self.place.local_ranks)

    def _prove_links(self, met: Met) -> None:
        """Connect to a rank of every other host; PeerError, on all ranks, if one cannot."""
        homes: dict[str, list[Card]] = {}
        for card in met.cards:
            homes.setdefault(card.home, []).append(card)
        mine = met.cards[self.place.rank]
        turn, room = homes[mine.home].index(mine), met.room
        self.clock = Clock(max(self.clock.left, len(homes) * CONNECTING))
        for home, cards in homes.items():
            if home != mine.home:
                self._prove_link(room, mine, cards[turn % len(cards)])
                self.clock.go_on()
        room.link()
        while room.linked() < self.place.ranks:
            room.heed()
            if not self.clock.left and (late := room.unlinked()):
                what = f"{self._names(late)} did not reach all hosts within"
                fix = "see their messages, and look at the network between the hosts"
                room.fail(PeerError(f"{what} {self.clock.seconds:.0f} s", fix))
            waiting = lambda: f"waiting for {self._names(room.unlinked())} to reach all hosts"  # noqa: E731
            self.clock.pause(waiting if self.presides else None)

    def _prove_link(self, room: Room, mine: Card, other: Card) -> None:
        try:
            network.reach(other.address, other.door, CONNECTING)
        except OSError as error:
            reason = (error.strerror or "timed out").lower()
            room.fail(
                PeerError(
                    f"{mine.host} ({mine.address}) cannot reach {other.host} at {other.address}: "
                    f"{reason}, though both reach rank 0",
                    "open all ports between the nodes, or name the interface of a network that "
                    "they share in GLOO_SOCKET_IFNAME (CPUs) or NCCL_SOCKET_IFNAME (GPUs): "
                    f"{mine.host} has {mine.networks}; {other.host} has {other.networks}",
                )
            )
