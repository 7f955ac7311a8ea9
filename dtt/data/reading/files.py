"""Input files, here or remote, plain or compressed: found by name, read in blocks.

Remote paths are fsspec's (s3://, gs://, https://, memory://, ...); what a service needs to know
comes from the environment, as its own clients read it (AWS_PROFILE, AWS_ENDPOINT_URL, FSSPEC_S3_*).
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from dtt.config.sources import COMPRESSIONS
from dtt.data.reading.compression import DamagedError, inflate
from dtt.errors import ConfigError, DataError, StorageError

BLOCK = 1 << 20
"""Bytes that are read, or come out of a decompressor, at a time."""
TRIES, PAUSE = 5, 0.5
"""A remote read that fails is tried so often, after pauses that double from this many seconds."""
HASH_WHOLE_BELOW = 1 << 30
"""Corpora larger than this are recognised by names, sizes and times instead of contents."""


@dataclass(frozen=True)
class File:
    """A file as it is stored; `version` differs when its contents do, as far as that is known
    without reading (the time of its last change, an ETag)."""

    name: str
    size: int
    version: str

    @property
    def compression(self) -> str | None:
        """The ending that says how the file is compressed, or None."""
        name = self.name.split("?")[0].lower() if is_remote(self.name) else self.name.lower()
        return next((ending for ending in COMPRESSIONS if name.endswith(ending)), None)


def is_remote(name: str) -> bool:
    """Whether a path names a file system of fsspec's; file:// is this machine's."""
    return "://" in name and not name.startswith("file://")


def find_files(
    patterns: tuple[str, ...], wanted: Callable[[str], bool] = lambda name: True
) -> list[File]:
    """Resolve files, folders and globs, in the order given, sorted within each.

    Of a folder or glob only the `wanted` names count, and no hidden ones. DataError names a pattern
    that finds nothing.
    """
    files: dict[str, File] = {}
    for pattern in patterns:
        find = _find_remote if is_remote(pattern) else _find_local
        for file in find(pattern.removeprefix("file://"), wanted):
            files.setdefault(file.name, file)
    return list(files.values())


def _find_local(pattern: str, wanted: Callable[[str], bool]) -> list[File]:
    try:
        return _look_for(pattern, wanted)
    except PermissionError as error:  # a folder above it
        raise not_permitted(pattern, error) from None


def _look_for(pattern: str, wanted: Callable[[str], bool]) -> list[File]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        inside = (p for p in path.rglob("*") if p.name[0] != "." and p.is_file())
        found = sorted(str(p) for p in inside if wanted(str(p)))
    elif path.exists():
        found = [str(path)]
    else:
        names = glob.glob(str(path), recursive=True)
        found = sorted(n for n in names if Path(n).is_file() and wanted(n))
    if not found:
        what = (
            "no files in it that can be read" if path.is_dir() else "no such file, folder or glob"
        )
        raise DataError(f"{pattern}: {what}", "check data.source.path")
    stats = [(name, os.stat(name)) for name in found]
    return [File(name, stat.st_size, str(stat.st_mtime_ns)) for name, stat in stats]


def _find_remote(pattern: str, wanted: Callable[[str], bool]) -> list[File]:
    def ask() -> list[File]:
        system, path = _filesystem(pattern)
        # A question mark in an address begins its query.
        letters = "*[" if pattern.startswith("http") else "*?["
        if any(letter in path for letter in letters):
            entries = system.glob(path, detail=True)
        elif (entry := system.info(path))["type"] == "directory":
            entries = system.find(path, detail=True)
        else:
            return [_remote_file(system, path, entry)]
        return [
            _remote_file(system, name, entry)
            for name, entry in sorted(entries.items())
            if entry["type"] == "file" and Path(name).name[0] != "." and wanted(name)
        ]

    found = _persistently(pattern, ask)
    if not found:
        raise DataError(
            f"{shown(pattern)}: no files there that can be read", "check data.source.path"
        )
    return found


def _remote_file(system: Any, path: str, entry: dict[str, Any]) -> File:
    name = system.unstrip_protocol(path)
    if entry.get("size") is None:
        raise DataError(
            f"{shown(name)}: the server does not say how large it is",
            "download it first (data.source.name url)",
        )
    stamps = ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created")
    version = next((str(entry[key]) for key in stamps if entry.get(key)), "")
    return File(name, entry["size"], version)


def _filesystem(name: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ConfigError(
            f"{shown(name)} needs the package fsspec", "pip install 'dtt[data]'"
        ) from None
    try:
        system, path = url_to_fs(name)
    except ImportError as error:
        raise ConfigError(
            f"{shown(name)}: {error}", "pip install 'dtt[data]', or that package"
        ) from None
    except ValueError as error:
        raise DataError(f"{shown(name)}: {error}", "check data.source.path") from None
    return system, path


def _persistently(name: str, ask: Callable[[], Any]) -> Any:
    """Return ask(), tried again where another try may help; DataError when it never does."""
    for attempt in range(TRIES):
        try:
            return ask()
        except (DataError, ConfigError):
            raise
        except FileNotFoundError:
            raise DataError(f"{shown(name)}: no such file", "check data.source.path") from None
        except PermissionError as error:
            raise DataError(
                f"{shown(name)}: permission denied ({_reason(error)})",
                "check the credentials in the environment",
            ) from None
        except Exception as error:  # each service's client raises classes of its own
            hopeless = "credentials" in str(error).lower()
            if attempt == TRIES - 1 or hopeless:
                raise DataError(
                    f"{shown(name)}: cannot be read ({_reason(error)})",
                    "check the credentials in the environment"
                    if hopeless
                    else "check the address and the network, and try again",
                ) from None
            time.sleep(PAUSE * 2**attempt)
    raise AssertionError


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__


class RemoteFile(io.RawIOBase):
    """A remote file, read by ranges; a range that fails is asked for again."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.system, self.path = _filesystem(file.name)
        self.offset = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.offset, os.SEEK_END: self.file.size}[whence]
        self.offset = max(base + offset, 0)
        return self.offset

    def tell(self) -> int:
        return self.offset

    def readinto(self, buffer: Any) -> int:
        start, stop = self.offset, min(self.offset + len(buffer), self.file.size)
        if start >= stop:
            return 0

        def ask() -> bytes:
            data = self.system.cat_file(self.path, start=start, end=stop)
            if len(data) != stop - start:
                raise OSError(f"{len(data)} bytes instead of {stop - start} at {start}")
            return cast(bytes, data)

        buffer[: stop - start] = _persistently(self.file.name, ask)
        self.offset = stop
        return stop - start


def open_file(file: File) -> IO[bytes]:
    """Open the stored bytes of a file, seekable; DataError if that cannot be."""
    if is_remote(file.name):
        return cast(IO[bytes], io.BufferedReader(RemoteFile(file), 4 * BLOCK))
    try:
        return open(file.name, "rb")
    except PermissionError as error:
        raise not_permitted(file.name, error) from None
    except OSError as error:
        raise DataError(
            f"{shown(file.name)}: {(error.strerror or str(error)).lower()}",
            "check data.source.path",
        ) from None


def not_permitted(name: str, error: PermissionError) -> StorageError:
    """The error for a file or folder that this user may not read."""
    reason = (error.strerror or "permission denied").lower()
    return StorageError(f"cannot read {shown(name)}: {reason}", "check the permissions")


def blocks(file: File, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yield the bytes [start, stop) of a file, decompressed, in blocks of at most 1 MiB.

    Memory does not grow with what a small file expands to. Raises DamagedError, after all bytes
    that could be had, where a compressed file breaks off.
    """
    if file.compression is None:
        with open_file(file) as opened:
            opened.seek(start)
            left = (file.size if stop is None else min(stop, file.size)) - start
            while left > 0 and (block := opened.read(min(BLOCK, left))):
                left -= len(block)
                yield block
        if left > 0:
            raise DamagedError(
                f"{shown(file.name)}: {left:,} bytes shorter than when it was found",
                "leave the file as it is while it is read",
            )
        return
    offset = 0
    for block in _inflated(file):
        yield from filter(None, [block[max(start - offset, 0) : _upto(stop, offset)]])
        offset += len(block)
        if stop is not None and offset >= stop:
            return


def _inflated(file: File) -> Iterator[bytes]:
    with open_file(file) as opened:
        yield from inflate(opened, file.compression or "", shown(file.name), BLOCK)


def _upto(stop: int | None, offset: int) -> int | None:
    return None if stop is None else max(stop - offset, 0)


def contents_digest(files: list[File]) -> list[list[Any]]:
    """Return what tells these files from others: base name, size, and a SHA-256 of the contents, or
    the version where that would mean to read more than 1 GiB or over a network."""
    local = not any(is_remote(file.name) for file in files)
    whole = local and sum(file.size for file in files) <= HASH_WHOLE_BELOW
    return [
        [Path(file.name).name, file.size, _sha256(file) if whole else file.version]
        for file in files
    ]


def _sha256(file: File) -> str:
    digest = hashlib.sha256()
    with open_file(file) as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def shown(name: str) -> str:
    """A path for messages: without the query and password of an address."""
    return re.sub(r"://[^/@]*@", "://", name.split("?")[0]) if is_remote(name) else name
