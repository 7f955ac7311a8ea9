"""Files of downloads on this disk: the record of each, and the part of it that is here so far.

Beside NAME are `.NAME.part` (what has arrived) and `.NAME.json` (the record: from where, which
version, size and SHA-256). A finished download is recognised by its record, without the network;
a process killed at any byte goes on there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from dtt import storage
from dtt.data.remote.retries import TemporaryError


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server, where it goes, and what is known of it beforehand."""

    url: str
    path: Path
    size: int | None = None
    sha256: str | None = None
    blob: str | None = None
    """Git's name of the content: the SHA-1 of "blob SIZE", NUL and the bytes."""
    revision: str = ""
    said: int | None = None
    """Bytes it has as its server says: to be shown, where `size` is what must come."""

    def record(self) -> Record | None:
        """The record of the finished download; None: there is none, or not of this version."""
        record = Record.read(self.path)
        if record is None or not record.complete or not record.is_of(self):
            return None
        try:
            return record if self.path.stat().st_size == record.size else None
        except OSError:
            return None


@dataclass(frozen=True)
class Record:
    """What is known of a file on this disk: `.NAME.json`."""

    url: str
    """Without query and password, which may be secret."""
    revision: str = ""
    size: int | None = None
    sha256: str | None = None
    """Of the bytes that arrived; before that, the expected one, where there is one."""
    validator: str | None = None
    """The server's ETag or date of the version whose beginning is here."""
    complete: bool = False

    @staticmethod
    def read(path: Path) -> Record | None:
        try:
            return Record(**json.loads(beside(path, "json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, path: Path) -> None:
        storage.write_atomic(beside(path, "json"), json.dumps(asdict(self), indent=1) + "\n")

    def is_of(self, file: RemoteFile) -> bool:
        """Whether this is the version that `file` asks for, as far as it says."""
        # A commit says what it is, whichever mirror it comes from.
        same = self.revision or self.url == shown(file.url)
        return bool(
            same
            and self.revision == file.revision
            and file.size in (None, self.size)
            and file.sha256 in (None, self.sha256)
        )


def beside(path: Path, suffix: str) -> Path:
    """A hidden file beside `path`: folders of data are read without those."""
    return path.with_name(f".{path.name}.{suffix}")


def shown(url: str) -> str:
    """A URL without what may be secret in it."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class Partial:
    """The part of a file that is here so far, hashed as it grows."""

    def __init__(self, file: RemoteFile, advance: Callable[[int], None]) -> None:
        self.file, self.path, self.advance = file, beside(file.path, "part"), advance
        self.has_digest = bool(file.sha256 or file.blob)
        fresh = Record(shown(file.url), file.revision, file.size, file.sha256)
        found = Record.read(file.path)
        self.size = 0
        with storage.storage_errors(self.path):
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            here = os.fstat(self._handle).st_size
        # Complete, and nothing here: the file was removed, to have what the server has now.
        resumes = found and found.is_of(file) and not (found.complete and not here)
        self.record = found if found and resumes else fresh
        self._start_hashes()
        if resumes:
            self._read()
        else:
            self.clear()

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._handle)
        if error is not None and not self.size:  # nothing came: nothing is left
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _start_hashes(self) -> None:
        self._sha256, self._blob = hashlib.sha256(), None
        if self.file.blob:
            self._blob = hashlib.sha1(f"blob {self.file.size}\0".encode(), usedforsecurity=False)

    def _take(self, block: bytes | memoryview) -> None:
        self._sha256.update(block)
        if self._blob:
            self._blob.update(block)
        self.size += len(block)
        self.advance(len(block))

    def _read(self) -> None:
        with storage.storage_errors(self.path, "read"):
            while block := os.read(self._handle, storage.BLOCK):
                self._take(block)

    def clear(self) -> None:
        """Begin again."""
        with storage.storage_errors(self.path):
            os.ftruncate(self._handle, 0)
            os.lseek(self._handle, 0, os.SEEK_SET)
        self.advance(-self.size)
        self.size = 0
        self._start_hashes()

    def begin(self, headers: Any, total: int | None) -> None:
        """Note which version it is that arrives now."""
        if total is not None and self.file.size not in (None, total):
            self.clear()
            raise TemporaryError(f"it has {total:,} bytes there, {self.file.size:,} expected")
        etag = headers.get("ETag") or ""
        # A weak ETag does not promise equal bytes (RFC 9110, 8.8.1).
        validator = etag if etag.startswith('"') else headers.get("Last-Modified")
        known = replace(self.record, size=total, validator=validator, complete=False)
        if known != self.record or not beside(self.file.path, "json").exists():
            known.write(self.file.path)
        self.record = known

    def append(self, block: bytes) -> None:
        with storage.storage_errors(self.path):
            storage.failpoint("fetch.block", file=self.path)
            rest = memoryview(block)
            while rest:
                rest = rest[os.write(self._handle, rest) :]
        self._take(block)

    def is_whole(self) -> bool:
        return self.record.size is not None and self.size == self.record.size

    def mismatch(self) -> str | None:
        """What is wrong with the whole file; None: nothing."""
        expected = self.record.size
        if expected is not None and self.size != expected:
            return f"{self.size:,} bytes came, {expected:,} expected"
        digest, wanted = self._sha256.hexdigest(), self.record.sha256
        if wanted is not None and digest != wanted:
            return f"its SHA-256 is {digest[:16]}..., not {wanted[:16]}..."
        if self._blob and self._blob.hexdigest() != self.file.blob:
            return f"its git hash is {self._blob.hexdigest()[:16]}..., not {self.file.blob}"
        return None

    def finish(self) -> None:
        """Sync and record it, then give it its name: after a crash between these it is whole."""
        with storage.storage_errors(self.path):
            os.fsync(self._handle)
        self.record = replace(
            self.record, size=self.size, sha256=self._sha256.hexdigest(), complete=True
        )
        self.record.write(self.file.path)
        storage.failpoint("fetch.recorded", file=self.path)
        storage.rename(self.path, self.file.path)
