"""The only writer of durable files: what it reports as written survives a crash and a power cut.

Every file is written under a name of its own, synced, and renamed into place; every folder whose
entries changed is synced too. Each of these operations passes a failpoint, so tests can stop the
process, fill the disk or break a file between any two of them.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from dtt.errors import BusyError, ConfigError, StorageError

BLOCK = 512 << 10
"""Bytes per write and per hash update: large enough that the interpreter's part is nothing, small
enough that a block is still in the core's cache when it is hashed."""

REMEDIES = {
    errno.ENOSPC: "free some space there or choose another folder",
    errno.EDQUOT: "your quota is used up: remove files or choose another folder",
    errno.EFBIG: "the file size limit is too low (see `ulimit -f`)",
    errno.EROFS: "the file system is read-only: choose a folder that can be written",
    errno.EACCES: "check the permissions or choose another folder",
    errno.EPERM: "check the permissions or choose another folder",
    errno.ENOENT: "check the path",
    errno.EEXIST: "move what is there away or choose another name",
    errno.ENOTDIR: "a part of this path is a file: check the path",
    errno.ENAMETOOLONG: "choose a shorter name",
}
LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Reasons that another try a moment later cannot change."""


class Written(NamedTuple):
    """What reached the disk: bytes, and their hash in hexadecimal."""

    size: int
    digest: str


Hashing = Callable[[], Any]
"""Makes a hash as hashlib's are: with `update` and `hexdigest`."""


@contextlib.contextmanager
def storage_errors(path: Path, verb: str = "write") -> Iterator[None]:
    """Turn an OSError inside into a StorageError that names `path`, the reason and the remedy."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        fix = REMEDIES.get(error.errno or 0, "check the disk or the mount")
        raise StorageError(f"cannot {verb} {path}: {reason}", fix) from error


def worth_retrying(error: StorageError) -> bool:
    """Whether the same operation may succeed a moment later (an I/O error, a stale handle)."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno not in LASTING


def sync_folder(path: Path) -> None:
    """Make the names inside `path` durable: files created, renamed or removed there before."""
    with storage_errors(path):
        failpoint("storage.sync_folder", file=path)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def make_folder(path: Path) -> None:
    """Create `path` and its missing parents, durably; a folder that exists is left as it is."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    with storage_errors(path, "create"):
        failpoint("storage.mkdir", file=path)
        path.mkdir(exist_ok=True)  # another rank may have been quicker
    sync_folder(path.parent)


def write_stream(
    path: Path,
    chunks: Iterable[bytes | memoryview],
    *,
    final: Path | None = None,
    hashing: Hashing = hashlib.sha256,
) -> Written:
    """Write a new file from flat byte buffers, synced, hashed as it is written in one pass.

    `path` must not exist, and its name is durable only after `sync_folder(path.parent)`. Errors
    name `final` where this is only its temporary file.
    """
    digest, size = hashing(), 0
    with storage_errors(final or path):
        failpoint("storage.open", file=path)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for chunk in chunks:
                view = memoryview(chunk)
                for start in range(0, len(view), BLOCK):
                    block = view[start : start + BLOCK]
                    failpoint("storage.write", file=path)
                    digest.update(block)
                    size += len(block)
                    while block:
                        block = block[os.write(handle, block) :]
            failpoint("storage.fsync", file=path)
            os.fsync(handle)
            if os.fstat(handle).st_size != size:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        finally:
            os.close(handle)
        failpoint("storage.written", file=path)
    return Written(size, digest.hexdigest())


def write_atomic(path: Path, data: bytes | str) -> Written:
    """Replace `path` by `data` durably: after any crash it holds the old bytes or the new ones."""
    return write_stream_atomic(path, [data.encode() if isinstance(data, str) else data])


def write_stream_atomic(path: Path, chunks: Iterable[bytes | memoryview]) -> Written:
    """As `write_atomic`, from buffers that are made one after another."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        written = write_stream(temporary, chunks, final=path)
        rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return written


def rename(old: Path, new: Path) -> None:
    """Rename durably within one folder; a file at `new` is replaced in the same instant."""
    with storage_errors(new):
        failpoint("storage.rename", file=old)
        old.replace(new)
    sync_folder(new.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it; a link is removed, not followed."""
    with storage_errors(path, "remove"):
        failpoint("storage.remove", file=path)
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            return
        for child in list(path.iterdir()):
            remove(child)
        path.rmdir()


def file_digest(
    path: Path, hashing: Hashing = hashlib.sha256, passed: Callable[[int], None] | None = None
) -> str:
    """Return the hash of a file in hexadecimal; memory use does not depend on its size.

    `passed` is told after each block how many bytes are hashed.
    """
    digest = hashing()
    with storage_errors(path, "read"):
        file = os.open(path, os.O_RDONLY)
        try:
            size = left = os.fstat(file).st_size
            # Not a whole block for each of a thousand small files, nor a second read for its end.
            buffer = memoryview(bytearray(min(left, BLOCK)))
            while left > 0 and (count := os.readv(file, [buffer])):
                digest.update(buffer[:count])
                left -= count
                if passed is not None:
                    passed(size - left)
        finally:
            os.close(file)
    return digest.hexdigest()


def expect(path: Path, size: int) -> None:
    """Tell the system that the first bytes of a file will be read soon; it does not wait."""
    if hasattr(os, "posix_fadvise"):
        with storage_errors(path, "read"):
            file = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(file, 0, size, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)


class RunLock:
    """The right to write to a run folder, held from `with` to its end by one process at a time.

    The lock is the kernel's (flock on RUN/lock), so it ends with its process however that dies,
    and holds across hosts where the file system has it (NFS, Lustre with -o flock). The file
    names the holder for people. A process forked meanwhile does not hold it.
    Raises BusyError, at once, if another process holds it.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / "lock"
        self._handle: int | None = None

    def __enter__(self) -> RunLock:
        make_folder(self.path.parent)
        with storage_errors(self.path, "lock"):
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise self._busy() from None
            except OSError:
                os.close(handle)
                raise
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": _now()}
            os.ftruncate(handle, 0)
            os.pwrite(handle, (json.dumps(holder) + "\n").encode(), 0)
        self._handle = handle
        # A data worker that outlives its parent would otherwise keep the folder locked.
        os.register_at_fork(after_in_child=self._close)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _busy(self) -> BusyError:
        try:
            holder = json.loads(self.path.read_bytes())
            who = f"process {holder['pid']} on {holder['host']} since {holder['started']}"
        except (OSError, ValueError, KeyError, TypeError):  # not written yet
            who = "another process"
        return BusyError(
            f"run folder {self.path.parent} is in use by {who}",
            "wait for it, stop it, or give this run another name",
        )


@contextlib.contextmanager
def exclusive(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file `path` while inside.

    If another process holds it, `waiting` is called and the lock is waited for. A process forked
    meanwhile does not hold it.
    """
    make_folder(path.parent)
    with storage_errors(path, "lock"):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(handle, fcntl.LOCK_EX)
        except BaseException:
            os.close(handle)
            raise
    held = [handle]

    def release() -> None:
        while held:
            os.close(held.pop())

    os.register_at_fork(after_in_child=release)
    try:
        yield
    finally:
        release()


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


# Failpoints: DTT_FAILPOINTS="NAME[@KEY=VALUE,...]:ACTION[=ARGUMENT];..." with
# DTT_ENABLE_FAILPOINTS=1. NAME may hold * and ?. Keys are the context of the call (file, step,
# rank: a file's name is enough) and `hit=N`, the Nth call that the rest matches.


@dataclass
class _Failpoint:
    pattern: str
    conditions: dict[str, str]
    hit: int | None
    action: str
    argument: str
    hits: int = field(default=0)

    def matches(self, name: str, context: dict[str, object]) -> bool:
        if not fnmatchcase(name, self.pattern):
            return False
        for key, wanted in self.conditions.items():
            value = context.get(key)
            if wanted not in (str(value), value.name if isinstance(value, Path) else None):
                return False
        self.hits += 1
        return self.hit is None or self.hit == self.hits

    def act(self, name: str, context: dict[str, object]) -> None:
        if self.action == "kill9":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.action == "exit":
            os._exit(int(self.argument))
        elif self.action == "sleep":
            time.sleep(float(self.argument))
        elif self.action == "truncate":
            os.truncate(str(context["file"]), int(self.argument))
        else:
            raise _exception("ENOSPC" if self.action == "enospc" else self.argument, name)


def failpoint(name: str, **context: object) -> None:
    """Do what DTT_FAILPOINTS says for `name`; nothing at all unless DTT_ENABLE_FAILPOINTS=1.

    Actions: kill9, stop, exit=N, sleep=SECONDS, raise=EXCEPTION or ERRNO name, enospc,
    truncate=BYTES (of the `file` in the context).
    """
    # All count this call before one of them acts, which may be its end.
    for point in [point for point in active_failpoints() if point.matches(name, context)]:
        point.act(name, context)


@cache
def active_failpoints() -> tuple[_Failpoint, ...]:
    """Return the failpoints in the environment, read once; raises ConfigError for a wrong one."""
    text = os.environ.get("DTT_FAILPOINTS", "")
    if not text or os.environ.get("DTT_ENABLE_FAILPOINTS") != "1":
        return ()
    print(f"dtt: warning: failpoints are active: {text}", file=sys.stderr)
    return tuple(_parse(part.strip()) for part in text.split(";") if part.strip())


def _parse(text: str) -> _Failpoint:
    point, _, action = text.partition(":")
    pattern, _, conditions = point.partition("@")
    action, _, argument = action.partition("=")
    try:
        wanted = dict(pair.split("=", 1) for pair in conditions.split(",") if pair)
        hit = int(wanted.pop("hit")) if "hit" in wanted else None
        if action in ("exit", "truncate"):
            int(argument)
        elif action == "sleep":
            float(argument)
        elif action == "raise":
            _exception(argument)
        elif action not in ("kill9", "stop", "enospc"):
            raise ValueError(action)
    except ValueError as error:
        fix = "write NAME[@KEY=VALUE,...]:ACTION[=ARGUMENT], e.g. storage.write@hit=2:kill9"
        raise ConfigError(f"DTT_FAILPOINTS: {text!r} is not a failpoint", fix) from error
    return _Failpoint(pattern, wanted, hit, action, argument)


def _exception(name: str, place: str = "") -> BaseException:
    code = getattr(errno, name, None)
    if isinstance(code, int):
        return OSError(code, os.strerror(code))
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        raise ValueError(name)
    return kind(f"failpoint {place}")
