"""The disk below the run folder: what it does with renames and locks, its speed, its room."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from dtt.doctor.finding import Finding, Subject, failed, ok, skipped, warning
from dtt.errors import StorageError
from dtt.storage import storage_errors

BLOCK = 8 << 20
WRITTEN = 256 << 20
"""Bytes that are written, unless that takes longer than PATIENCE."""
PATIENCE = 4.0
"""Seconds."""
SLOW = 50e6
"""Bytes per second below which saving becomes a burden."""
BYTES_OF_PARAMETER = 16
"""fp32 weights, gradients and two moments: a checkpoint is smaller, and its writing needs room."""


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above that exists: that is where it will be made."""
    folder = folder.absolute()
    while not folder.exists() and folder.parent != folder:
        folder = folder.parent
    return folder


def check_files(subject: Subject) -> Iterator[Finding]:
    folder = existing(subject.config.dir)
    yield judge_files(folder, subject.bench.run(try_files, folder, seconds=20))


def try_files(folder: Path) -> dict[str, bool]:
    """Return whether files there are replaced by a rename and locked for others. StorageError if
    none can be written."""
    with _scratch(folder) as scratch:
        old, new = scratch / "old", scratch / "new"
        with storage_errors(folder):
            old.write_bytes(b"old")
            new.write_bytes(b"new")
            new.replace(old)
        return {"renames": old.read_bytes() == b"new" and not new.exists(), "locks": _locks(old)}


def _locks(path: Path) -> bool:
    with path.open("rb") as mine, path.open("rb") as other:
        try:
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def judge_files(folder: Path, found: dict[str, bool]) -> Finding:
    """Judge what checkpoints rely on."""
    figures = {"folder": str(folder), **found}
    if not found["renames"]:
        return failed(
            f"{folder}: a rename does not replace a file at once",
            "choose another file system with --checkpoint-dir: this one can lose checkpoints",
            figures,
        )
    if not found["locks"]:
        return warning(
            f"{folder}: files cannot be locked",
            "mount it with locks (NFS: nolock off; Lustre: -o flock), and until then never start "
            "a run twice",
            figures,
        )
    return ok(f"{folder}: can be written, renames replace, locks hold", figures)


def check_speed(subject: Subject) -> Iterator[Finding]:
    folder = existing(subject.config.dir)
    found = subject.bench.run(measure_speed, folder, seconds=30)
    yield judge_speed(folder, found, subject.parameters)


def measure_speed(folder: Path) -> dict[str, float]:
    """Return MB/s of writing with a sync at the end, and of reading past the cache where the system
    lets go of it."""
    block = os.urandom(BLOCK)
    with _scratch(folder) as scratch, storage_errors(folder):
        path = scratch / "speed"
        start, written = time.perf_counter(), 0
        with path.open("wb", buffering=0) as file:
            while written < WRITTEN and time.perf_counter() - start < PATIENCE:
                written += file.write(block)
            os.fsync(file.fileno())
            wrote = time.perf_counter() - start
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start, buffer = time.perf_counter(), bytearray(BLOCK)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        read = time.perf_counter() - start
    return {
        "write_mb_s": round(written / wrote / 1e6, 1),
        "read_mb_s": round(written / read / 1e6, 1),
    }


def judge_speed(folder: Path, found: dict[str, float], parameters: int) -> Finding:
    """Judge MB/s; with the parameters of a model, say what a checkpoint of it takes."""
    write, read = found["write_mb_s"], found["read_mb_s"]
    shown = f"{write:,.0f} MB/s written and synced, {read:,.0f} MB/s read"
    if parameters:
        size = parameters * (BYTES_OF_PARAMETER - 4)
        shown += f"; a checkpoint of at most {_size(size)} takes {size / write / 1e6:,.1f} s"
    if write * 1e6 < SLOW:
        return warning(
            shown,
            "choose a faster disk with --checkpoint-dir, or save less often (checkpoint.every)",
            found,
        )
    return ok(shown, found)


def check_space(subject: Subject) -> Iterator[Finding]:
    folder = existing(subject.config.dir)
    with storage_errors(folder, "read"):
        free = shutil.disk_usage(folder).free
    if not subject.parameters:
        yield skipped(f"{_size(free)} free in {folder}; the size of the model is not known")
        return
    yield judge_space(folder, free, subject.parameters, subject.config.checkpoint.keep)


def judge_space(folder: Path, free: float, parameters: int, keep: int) -> Finding:
    """Judge the free bytes against the checkpoints that are kept, and one more that is written."""
    need = parameters * BYTES_OF_PARAMETER * (keep + 1)
    shown = f"{_size(free)} free in {folder}, the run's checkpoints need up to {_size(need)}"
    figures = {"free_gb": round(free / 1e9, 2), "needed_gb": round(need / 1e9, 4)}
    mend = "free some space, keep fewer (checkpoint.keep), or choose another --checkpoint-dir"
    if free < need:
        return failed(shown, mend, figures)
    return warning(shown, mend, figures) if free < 1.5 * need else ok(shown, figures)


def _size(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder in `folder` that is gone afterwards."""
    path = folder / f".dtt-doctor-{secrets.token_hex(4)}"
    with storage_errors(folder):
        if not folder.is_dir():
            raise StorageError(f"{folder} is a file", "choose another folder: --checkpoint-dir")
        path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
