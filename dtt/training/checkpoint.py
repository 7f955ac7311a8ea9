"""Writing checkpoints: complete and verified, or invisible, whatever stops the process and when.

step-N.<attempt>.tmp/ -> files, hashed as they are written, synced -> manifest -> sync of the
folder -> rename to step-N -> sync of the parent -> pointers -> retention. docs/training.md shows
the layout; `dtt.training.saved` reads it.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from re import compile as regex
from typing import Any

from blake3 import blake3
from torch import Tensor

from dtt import storage
from dtt.errors import CheckpointError, DttError, StorageError
from dtt.parallel.part import Part
from dtt.runs import MANIFEST, STEP, scan
from dtt.storage import Written, failpoint
from dtt.training.ranks import collect, contribute, write_parts
from dtt.training.saved import (
    FALLING_BACK,
    FORMAT,
    STATE,
    Saved,
    best_loss,
    newest,
    read,
    seal,
)
from dtt.training.snapshot import Group, Staging, digest_of, untie
from dtt.version import __version__

LEFTOVER = regex(r"step-\d{8,}\.\w+\.tmp|\.(last|best)\.\w+\.tmp|\.trash-.+")
"""Names that only a save cut short leaves behind."""
PAUSES = (0.1, 0.5)
"""Seconds before the second and the third try of a save."""
MOST_FAILURES = 3
"""Saves that may fail in a row before training stops."""
SLOW = 60.0
"""Seconds of waiting for the save before, after which each such span is reported."""


@dataclass(frozen=True)
class _Job:
    step: int
    groups: dict[str, Group]
    files: dict[str, bytes]
    best_loss: float | None
    work: str | None = None
    """The name of the folder that several ranks write to."""
    begun: float = 0.0


class Checkpoints:
    """The checkpoints of one run: saves them, keeps the newest `keep` and the best.

    Only the process that holds the run's lock may call `save`. With `background`, a save costs
    the caller one copy of the state in memory; `warn` is called on the caller's thread only.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        background: bool,
        warn: Callable[[str], None],
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self._folder, self._rank, self._ranks = folder, rank, ranks
        self._keep = keep
        self._background = background
        self._warn = warn
        self._staging = Staging()
        self._whole: dict[str, object] = {}  # what this process wrote or verified, and its stamp
        self._damaged: dict[str, str] = {}
        self._thread: threading.Thread | None = None
        self._reserving: threading.Thread | None = None
        self._job: _Job | None = None  # under way, or its outcome not yet reported
        self._saved = False
        self._error: Exception | None = None
        self._notes: list[str] = []
        self._failures = 0
        self._failure: StorageError | None = None
        self.longest: float | None = None
        """Seconds that the longest save took until its checkpoint was complete."""

    def newest(self, *, hashed: bool = True) -> Saved | None:
        """Return the newest whole checkpoint, with a warning for each newer damaged one.

        Without `hashed` its tensors are to be proved by the caller, who tells what came of it
        (`judge`). None if there is none; CheckpointError if there are some and all are damaged.
        """
        self._settle()
        saved = newest(self._folder, self._warn, self._damaged, hashed=hashed)
        if saved is not None and hashed:
            self.judge(saved, None)
        return saved

    def judge(self, saved: Saved, damaged: str | None) -> None:
        """Take note that a checkpoint is whole, or of what is damaged: `newest` leaves it out.

        Raises CheckpointError for a damaged one of another run, which was asked for by name.
        """
        is_own = saved.path.parent == self._folder
        if damaged is None and is_own:
            self._whole[saved.path.name] = _stamp(saved.path)
        elif damaged is not None and is_own:
            self._damaged[saved.path.name] = damaged
            self._warn(f"{damaged}; {FALLING_BACK}")
        elif damaged is not None:
            raise CheckpointError(damaged, "choose another checkpoint of that run")

    def reserve(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Allocate the memory for copies of `tensors` meanwhile, so that the first save is quick.

        Only a matter of speed; call it once, when the state has its final shapes.
        """
        if self._background:
            groups = {group: untie(content) for group, content in tensors.items()}
            self._reserving = threading.Thread(target=self._staging.reserve, args=(groups,))
            self._reserving.start()

    def begin(self, step: int) -> str | None:
        """Make a folder for all ranks to write to, on the first rank, and return its name.

        None if that fails, which is a save that failed.
        """
        self._settle()
        name = f"{_name(step)}.{secrets.token_hex(4)}.tmp"
        try:
            storage.make_folder(self._folder / name)
        except StorageError as error:
            self._failed(step, error)
            return None
        return name

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        files: Mapping[str, bytes],
        *,
        best_loss: float | None = None,
        parts: Mapping[str, Mapping[str, Part]] | None = None,
        work: str | None = None,
    ) -> None:
        """Save the state of `step`: `tensors` by group and name, `state` as JSON, `files` by name.

        Where ranks divide the tensors, each saves its own `parts` of them to the folder `work`
        (`begin`), and what the first rank says of the rest holds.
        `best_loss` is the validation loss if it is the lowest so far. A save that fails is a
        warning, here or at a later call; the third in a row is a StorageError. What was saved
        before stays whole in any case. The caller may change all arguments once this returns.
        """
        begun = time.monotonic()
        self._settle()
        contents = dict(files)
        contents[STATE] = (json.dumps(state, indent=2, allow_nan=False) + "\n").encode()
        groups = {group: untie(content) for group, content in tensors.items()}
        if parts is not None:
            groups = {g: replace(content, parts=dict(parts[g])) for g, content in groups.items()}
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        if self._background:
            groups = self._staging.copy(groups)
        failpoint("checkpoint.snapshot", step=step)
        self._job = _Job(step, groups, contents, best_loss, work, begun)
        self._saved, self._error, self._notes = False, None, []
        if self._background:
            thread = threading.Thread(target=self._run, args=(self._job,), name="checkpoint")
            with suppress(RuntimeError):  # no thread to be had: save in the foreground
                thread.start()
                self._thread = thread
                return
        self._run(self._job)
        self._settle()

    def poll(self) -> None:
        """Report the outcome of a background save if it has ended; call it at every step."""
        if self._thread is not None and not self._thread.is_alive():
            self._settle()

    def finish(self) -> None:
        """Wait for the save under way; raises StorageError if the last save failed."""
        self._settle()
        if self._failure is not None:
            raise self._failure

    def _settle(self) -> None:
        """Wait for the save under way, report its outcome, and count failures."""
        if self._job is None:
            return
        job, start = self._job, time.monotonic()
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(SLOW)
            if self._thread.is_alive():
                waited = time.monotonic() - start
                self._warn(f"still waiting for the checkpoint of step {job.step}: {waited:.0f} s")
        self._thread = self._job = None
        if self._rank:  # the first rank knows, and says it
            return
        for note in self._notes:
            self._warn(note)
        if self._saved:
            self._failures, self._failure = 0, None
            return
        self._failed(job.step, self._error)

    def _failed(self, step: int, error: Exception | None) -> None:
        """Warn of a save that failed; StorageError at the third in a row."""
        why = error.what if isinstance(error, DttError) else repr(error or "its thread died")
        what = f"the checkpoint of step {step} was not saved: {why}"
        fix = error.fix if isinstance(error, DttError) else "see the log of the run"
        self._failures += 1
        self._failure = StorageError(what, fix)
        self._failure.__cause__ = error
        if self._failures >= MOST_FAILURES:
            raise StorageError(f"{self._failures} saves failed in a row; {what}", fix) from error
        self._warn(f"{what}; training goes on, earlier checkpoints are intact; {fix}")

    def _run(self, job: _Job) -> None:
        try:
            if self._rank:
                assert job.work is not None
                contribute(self._folder / job.work, self._rank, self._ranks, job.groups)
            else:
                self._store(job)
            self._saved = True
            self.longest = max(self.longest or 0.0, time.monotonic() - job.begun)
        except Exception as error:
            self._error = error

    def _store(self, job: _Job) -> None:
        warned = False
        for pause in (*PAUSES, None):
            try:
                path = self._commit(job)
                break
            except StorageError as error:
                # Several ranks have written once, and do not know of a second try.
                if pause is None or job.work or not storage.worth_retrying(error):
                    raise
                if not warned:
                    self._notes.append(f"{error.what}; saving step {job.step} was tried again")
                warned = True
                time.sleep(pause)
        self._whole[path.name] = _stamp(path)
        with self._noted():
            storage.write_atomic(self._folder / "last", f"{path.name}\n")
            if job.best_loss is not None:
                storage.write_atomic(self._folder / "best", f"{path.name} {job.best_loss!r}\n")
            failpoint("checkpoint.pointers", step=job.step)
        with self._noted():
            self._sweep()
            self._retain(path)
            failpoint("checkpoint.retained", step=job.step)

    def _commit(self, job: _Job) -> Path:
        """Write everything under a name of its own, then make it the checkpoint by one rename."""
        storage.make_folder(self._folder)
        with self._noted():
            self._sweep(job.work)
        final = self._folder / _name(job.step)
        work = self._folder / (job.work or f"{final.name}.{secrets.token_hex(4)}.tmp")
        try:
            storage.make_folder(work)
            self._write(work, job)
            failpoint("checkpoint.commit", step=job.step, file=work)
            if final.exists():  # stays readable as .old until the new one is in place
                storage.rename(final, final.with_name(f"{final.name}.old"))
            storage.rename(work, final)
            failpoint("checkpoint.committed", step=job.step, file=final)
        except BaseException:
            with suppress(StorageError):
                storage.remove(work)
            raise
        return final

    def _write(self, work: Path, job: _Job) -> None:
        files: dict[str, Written] = {}
        tensors: dict[str, dict[str, Any]] = {}
        ranks = self._ranks if job.work else 1
        reports = [write_parts(work, 0, ranks, job.groups), *collect(work, ranks)]
        for group, content in job.groups.items():
            found = [report.files[group] for report in reports]
            files |= {name: written for name, written, _ in found}
            tensors[group] = {
                "files": [name for name, _, _ in found],
                "digest": digest_of(rows for _, _, rows in found),
                "tied": content.tied,
            }
        for name, data in job.files.items():
            storage.make_folder((work / name).parent)
            files[name] = storage.write_stream(work / name, [data], hashing=blake3)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "dtt": __version__,
            "step": job.step,
            "best_loss": job.best_loss,
            "files": {
                n: {"size": size, "blake3": found} for n, (size, found) in sorted(files.items())
            },
            "tensors": tensors,
        }
        failpoint("checkpoint.manifest", step=job.step, file=work)
        storage.write_stream(work / MANIFEST, [seal(manifest)])
        for parent in {str(parent) for name in files for parent in PurePosixPath(name).parents}:
            storage.sync_folder(work / parent)

    def _sweep(self, work: str | None = None) -> None:
        """Remove what saves cut short have left; put a checkpoint back that was to be replaced."""
        with storage.storage_errors(self._folder, "read"):
            paths = sorted(self._folder.iterdir())
        for path in paths:
            if path.name == work:  # other ranks may be writing to it
                continue
            if LEFTOVER.fullmatch(path.name):
                storage.remove(path)
            elif STEP.fullmatch(path.name) and path.suffix == ".old":
                new = path.with_suffix("")
                if new.exists():  # it was renamed only after all of it was synced
                    self._discard(path)
                else:
                    storage.rename(path, new)

    def _retain(self, current: Path) -> None:
        """Remove all but the newest `keep` whole checkpoints, the best one and `current`.

        Damaged ones are not counted, and go only when they are older than what is kept.
        """
        kept, found = 0, scan(self._folder)
        spare = [path for path in found if path != current and not path.name.endswith(".old")]
        best = self._best(found)
        for path in found:
            if kept < self._keep:
                kept += self._is_whole(path)
            elif path in spare and path != best:
                self._discard(path)

    def _best(self, found: list[Path]) -> Path | None:
        losses: dict[Path, float] = {}
        for path in found:
            with suppress(DttError):
                loss = best_loss(path)
                if loss is not None:
                    losses[path] = loss
        ranked = sorted(losses, key=lambda path: losses[path])
        return next((path for path in ranked if self._is_whole(path)), None)

    def _is_whole(self, path: Path) -> bool:
        stamp = _stamp(path)
        if self._whole.get(path.name) != stamp:
            try:
                read(path)
            except DttError:
                return False
            self._whole[path.name] = stamp
        return True

    def _discard(self, path: Path) -> None:
        """Remove a checkpoint so that it is never listed half-removed."""
        self._whole.pop(path.name, None)
        trash = path.with_name(f".trash-{path.name}.{secrets.token_hex(4)}")
        storage.rename(path, trash)
        storage.remove(trash)

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Housekeeping inside may fail without failing the save: a note instead of an error."""
        try:
            yield
        except StorageError as error:
            self._notes.append(str(error))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _stamp(path: Path) -> object:
    """Return what changes when a file in the folder is touched, so that it is hashed again."""
    with storage.storage_errors(path, "read"):
        status = [(file, file.lstat()) for file in sorted(path.rglob("*"))]
    return [(file, entry.st_size, entry.st_mtime_ns, entry.st_ino) for file, entry in status]
