"""The processes that make a corpus together, over nothing but a shared folder.

A piece of work belongs to whoever created its claim, DATA/.crew/CORPUS/PIECE, a file that holds the
name of a member (`members`). When that member leaves or dies, the claim is free.

Claims only spare double work. Whatever is made is written atomically and depends on nothing but
the settings, so two processes that do the same (one was thought dead, a file system is late) do no
harm.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from dtt import storage
from dtt.data.preparation.members import BEAT, Members
from dtt.errors import EXIT_INTERNAL, BusyError, ConfigError, DttError, OtherRankError, PeerError
from dtt.place import Array, Place

ARRIVAL = 60.0
"""Seconds that the ranks of a launch wait for each other to come."""
LINGER = 5.0
"""Seconds for which a rank that failed waits for the others to notice."""
REASON = 300
"""Characters of an error by which ranks know that they fail alike."""
ALONE = Place()


class Crew:
    """This process among those that work below one data folder.

    Inside `with`. A rank that leaves with an error takes the other ranks of its launch with it:
    they raise OtherRankError with its exit code at their next `look`. A process that dies without
    a word is replaced: the others take over what it had claimed.
    """

    def __init__(
        self, data: Path, place: Place = ALONE, launch: str = "", array: Array | None = None
    ) -> None:
        token = secrets.token_hex(6)
        task, tasks = (array.task, array.tasks) if array else (0, 1)
        self.home, self.rank, self.ranks = data / ".crew", place.rank, place.ranks
        self.array = array
        self.seat = (task * place.ranks + place.rank, tasks * place.ranks)
        """Which of how many processes that share the work, as far as launchers say."""
        self.alone = self.seat[1] == 1
        self.job = array.job if array else launch or token
        """The same for all tasks of an array and all ranks of a launch."""
        name = (launch or token) + (f"-{task}" if array else "")
        self.members = Members(self.home, name, token, place.rank, self.job)
        self._looked = 0.0
        self._claims = self.home

    def __enter__(self) -> Crew:
        if self.ranks > 1:
            self.members.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.members.begun:
            return
        try:
            if self.ranks > 1 and (error is None or isinstance(error, Exception)):
                self._linger(error)
        finally:
            self.members.end()
        if error is not None and self._said_by_a_lower_rank():
            raise OtherRankError(self.members.own.failed) from None

    @property
    def speaks(self) -> bool:
        """Whether it tells the user what all ranks do."""
        return self.rank == 0

    def look(self, *, now: bool = False) -> None:
        """Raise OtherRankError if another rank of this launch has failed."""
        # All ranks look at all: the more there are, the rarer.
        pause = max(BEAT, self.ranks / 16)
        if self.ranks == 1 or (not now and time.monotonic() - self._looked < pause):
            return
        self._looked = time.monotonic()
        for record in self.members.launched():
            if record.failed:
                raise OtherRankError(record.failed)

    # --- coming together -------------------------------------------------------------------------

    def meet(self, folder: str, first: Callable[[], None]) -> None:
        """Return when all ranks of the launch are here for the same corpus, and `first` was run.

        Rank 0 runs it, before any other goes on. Raises PeerError if a rank does not come (or the
        ranks do not see the same folder), ConfigError if one comes for another corpus. Without
        other ranks it runs `first`, that is all.
        """
        self.members.begin()
        number = self.members.own.meeting + 1
        self._claims = self.home / folder
        self.members.tell(meeting=number, folder=folder)
        if self.rank == 0:
            everybody = set(range(1, self.ranks))
            self._await(lambda: everybody - self._came(number))
            self._agree(number)
            first()
            self.members.tell(ready=number)
        else:
            self._await(lambda: {0} - self._opened(number))
        self.members.tell(passed=number)

    def _came(self, number: int) -> set[int]:
        return {r.rank for r in self.members.launched() if r.meeting >= number}

    def _opened(self, number: int) -> set[int]:
        return {r.rank for r in self.members.launched() if r.ready >= number}

    def _await(self, missing: Callable[[], set[int]]) -> None:
        """Wait until no rank is missing; those that were never seen have ARRIVAL seconds."""
        deadline, pause = time.monotonic() + ARRIVAL, 0.02
        while wanted := missing():
            self.look(now=True)
            lost = wanted - {record.rank for record in self.members.launched()}
            gone = lost & {record.rank for record in self.members.ever_launched()}
            if gone and wanted & gone & missing():
                self.look(now=True)
                self._lost(gone, "ended before the work began")
            if lost and time.monotonic() > deadline:
                self._lost(lost, "did not come")
            time.sleep(pause)
            pause = min(2 * pause, 0.1 + self.ranks / 100)

    def _lost(self, ranks: set[int], what: str) -> None:
        who = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))}"
        raise PeerError(
            f"{who} of {self.ranks} {what} (waited at {self.home.absolute()})",
            "check that all ranks run and that all machines share the folder data.dir",
        )

    def _agree(self, number: int) -> None:
        mine = self.members.own.folder
        for record in self.members.launched():
            if record.meeting == number and record.folder != mine:
                raise ConfigError(
                    f"rank {record.rank} would make {record.folder}, rank 0 {mine}: their settings "
                    "or their texts are not the same",
                    "give all ranks the same configuration and the same files",
                )

    def check_free(self, folder: Path) -> None:
        """Raise BusyError if a process of another job works on the corpus."""
        for attempt in range(2):
            own, members = self.members.own, self.members
            found = [
                (members.certain(name), record)
                for name, record in members.others()
                if record.folder == own.folder and record.job != own.job
            ]
            for certain, record in found:
                if certain:
                    raise BusyError(
                        f"{folder} is being made by process {record.pid} on "
                        f"{record.host.split('/')[0]}",
                        "wait for it or stop it; without --force this command would help it",
                    )
            if not found or attempt:
                return
            time.sleep(2.5 * BEAT)

    # --- dividing the work -----------------------------------------------------------------------

    def claim(self, piece: str) -> bool:
        """Take a piece of work; False: another process that is alive has it."""
        path = self._claims / piece
        for _ in range(3):
            try:
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileNotFoundError:
                storage.make_folder(self._claims)
                continue
            except FileExistsError:
                return self._inherit(path)
            except OSError:
                with storage.storage_errors(path):
                    raise
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.members.name)
            return True
        return False

    def _inherit(self, path: Path) -> bool:
        """Take over a claim if its holder is gone."""
        holder = ""
        for pause in (0.0, 0.1):  # it is being written, or its writer died at once
            time.sleep(pause)
            try:
                holder = path.read_text(encoding="utf-8")
            except OSError:
                return False  # the corpus has just been finished
            if holder:
                break
        if holder == self.members.name:
            return True
        if holder and self.members.lives(holder):
            return False
        temporary = path.with_name(f".{path.name}.{self.members.name}")
        with storage.storage_errors(path):
            try:
                temporary.write_text(self.members.name, encoding="utf-8")
                temporary.replace(path)
            except FileNotFoundError:
                return False  # finished, just now
        return True

    def once(
        self,
        piece: str,
        done: Callable[[], bool],
        action: Callable[[], None],
        idle: Callable[[], None] = lambda: None,
    ) -> None:
        """Return when `done`; one of all processes runs `action`, another if that one dies.

        Those who wait run `idle` now and then.
        """
        pause = 0.02
        while not done():
            if self.claim(piece):
                if not done():
                    action()
                return
            self.look()
            idle()
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def forget(self, folder: str = "") -> None:
        """Remove the claims of a finished corpus (default: of the last meeting)."""
        claims = self.home / folder if folder else self._claims
        if claims != self.home:
            shutil.rmtree(claims, ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody is there
            self.home.rmdir()

    def is_last(self) -> bool:
        """Whether nobody else may be at work on the corpus of the last meeting."""
        if self.ranks > 1 or not self.members.begun:
            return False
        own = self.members.own
        return all(record.folder != own.folder for _, record in self.members.others())

    # --- leaving ---------------------------------------------------------------------------------

    def _linger(self, error: BaseException | None) -> None:
        """Stay until the other ranks have seen what they must: the open meeting, or the failure."""
        if error is not None:
            code = error.exit_code if isinstance(error, DttError) else EXIT_INTERNAL
            self.members.tell(failed=code, reason=str(error)[:REASON])
            if isinstance(error, OtherRankError):
                return
        deadline = time.monotonic() + LINGER
        while time.monotonic() < deadline and self._awaited(error is not None):
            time.sleep(0.05)

    def _awaited(self, failed: bool) -> bool:
        here = self.members.launched()
        if not failed:
            return any(not r.failed and r.passed < self.members.own.passed for r in here)
        # The highest rank leaves first, so that the lowest of those with the same reason says it.
        late = len({r.rank for r in self.members.ever_launched()}) < self.ranks - 1
        return late or any(not r.failed or r.rank > self.rank for r in here)

    def _said_by_a_lower_rank(self) -> bool:
        own = self.members.own
        return any(
            r.failed and r.reason == own.reason and r.rank < self.rank
            for r in self.members.ever_launched()
        )
