"""Who works below a data folder: a record per process, and signs of life.

A record is a file DATA/.crew/members/LAUNCH.RANK.TOKEN, whose `beat` its process raises every
second. A process is dead when its beat stands still, or when it ran on this machine and the process
table does not have it. Clocks of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dtt import storage

BEAT = 1.0
"""Seconds between two signs of life."""
LEASE = 30.0
"""Seconds without a sign of life after which a process counts as dead."""
SIZE = 4096
"""Bytes of a record: all have as many, so that one is rewritten without a moment of none."""

# A child forked while the beat's thread is in the middle of something would inherit half of it.
_still = threading.Lock()
os.register_at_fork(
    before=_still.acquire, after_in_parent=_still.release, after_in_child=_still.release
)


@dataclass(frozen=True)
class Record:
    """What a member tells the others."""

    host: str
    pid: int
    rank: int
    job: str
    """The same for all tasks of an array, and for all ranks of a launch."""
    born: str = ""
    """When the process began, as /proc has it: another may get its number."""
    beat: int = 0
    meeting: int = 0
    """How many corpora it has come to."""
    folder: str = ""
    """The corpus of its last meeting."""
    ready: int = 0
    """Of rank 0: how many meetings it has opened."""
    passed: int = 0
    """How many meetings it has gone through."""
    failed: int = 0
    """The exit code that it ends with, if it failed."""
    reason: str = ""


class Members:
    """This process's record below `home`, from `begin` to `end`, and those of the others."""

    def __init__(self, home: Path, launch: str, token: str, rank: int, job: str) -> None:
        self.home, self.folder, self.launch = home, home / "members", launch
        self.name = f"{launch}.{rank:05d}.{token}"
        self.own = Record(_host(), os.getpid(), rank, job, _born(os.getpid()))
        self._known: dict[str, Record] = {}
        self._changed: dict[str, tuple[float, bool]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def begun(self) -> bool:
        """Whether others can see this process."""
        return self._thread is not None

    def begin(self) -> None:
        """Let others see this process; StorageError if nothing can be written there."""
        if self._thread is None:
            storage.make_folder(self.folder)
            with storage.storage_errors(self.folder):
                self._write()
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Take the record away, and those of the dead, and the folders if no others are there."""
        assert self._thread is not None
        list(self.others())
        self._stop.set()
        self._thread.join()
        for remove in ((self.folder / self.name).unlink, self.folder.rmdir, self.home.rmdir):
            with contextlib.suppress(OSError):
                remove()

    def tell(self, **news: int | str) -> None:
        """Change fields of the record."""
        with _still, storage.storage_errors(self.folder):
            self.own = replace(self.own, **news)  # type: ignore[arg-type]
            self._write()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with _still, contextlib.suppress(OSError):
                self.own = replace(self.own, beat=self.own.beat + 1)
                self._write()

    def _write(self) -> None:
        # Not synced: after a power cut nobody lives. Nor by way of a temporary file, which a kill
        # would leave behind.
        flags = os.O_WRONLY | os.O_CREAT
        try:
            handle = os.open(self.folder / self.name, flags, 0o666)
        except FileNotFoundError:  # somebody who left took the empty folder away
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / self.name, flags, 0o666)
        try:
            os.write(handle, json.dumps(asdict(self.own)).ljust(SIZE).encode())
        finally:
            os.close(handle)

    def lives(self, name: str) -> bool:
        """Whether the member of that name may be alive."""
        record = self._read(name)
        return record is not None and self._alive(name, record)

    def others(self, prefix: str = "") -> Iterator[tuple[str, Record]]:
        """Yield the members that may be alive; the records of dead ones are removed."""
        try:
            names = os.listdir(self.folder)
        except OSError:
            return
        for name in names:
            if name == self.name or not name.startswith(prefix):
                continue
            record = self._read(name)
            if record is not None and self._alive(name, record):
                yield name, record
            elif record is not None:
                with contextlib.suppress(OSError):
                    (self.folder / name).unlink()

    def launched(self) -> list[Record]:
        """The other ranks of this launch that are certainly alive."""
        found = self.others(f"{self.launch}.")
        return [record for name, record in found if self.certain(name)]

    def ever_launched(self) -> list[Record]:
        """What the other ranks of this launch said last, those that have left included."""
        prefix = f"{self.launch}."
        return [r for n, r in self._known.items() if n.startswith(prefix) and self.certain(n)]

    def certain(self, name: str) -> bool:
        """Whether a member has shown that it is alive: a launch that died leaves records too."""
        return self._known[name].host == self.own.host or self._changed[name][1]

    def _read(self, name: str) -> Record | None:
        for pause in (0.01, 0.0):  # it may be in the middle of being written
            try:
                record = Record(**json.loads((self.folder / name).read_text(encoding="utf-8")))
                break
            except OSError:
                return None
            except (ValueError, TypeError):
                time.sleep(pause)
        else:
            return None
        before, now = self._known.get(name), time.monotonic()
        if before is None:
            self._changed[name] = now, False
        elif before.beat != record.beat:
            self._changed[name] = now, True
        self._known[name] = record
        return record

    def _alive(self, name: str, record: Record) -> bool:
        if record.host == self.own.host and not _runs(record.pid, record.born):
            return False
        return time.monotonic() - self._changed[name][0] < LEASE


def _host() -> str:
    """This machine, or the container on it: where a process number means something."""
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{space}"


def _runs(pid: int, born: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _born(pid)
    return now != "dead" and (now == born or not (now and born))


def _born(pid: int) -> str:
    """Return when a process began, "dead" if it is and not yet waited for, "" if none can say."""
    with contextlib.suppress(OSError, IndexError):
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = status.rsplit(")", 1)[1].split()
        return "dead" if fields[0] in "ZX" else fields[19]
    return ""
