"""Errors as lines for people, for the command line and for workers that it starts."""

from __future__ import annotations

import errno
import os
import sys

from dtt.errors import EXIT_INTERNAL, ConfigError, DttError, OtherRankError, StorageError

STORAGE_FIXES = {
    errno.ENOSPC: "free some space, or choose another folder with --checkpoint-dir",
    errno.EDQUOT: "free some of your quota, or choose another folder with --checkpoint-dir",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "check the path",
    errno.EROFS: "choose a place that can be written",
    errno.EIO: "check the disk, or choose another place",
}


def report_error(prog: str, error: Exception, *, quiet: bool = False) -> int:
    """Print what went wrong, a line each, unless `quiet`; return the exit code of it."""
    known = _explained(error)
    lines = str(known).splitlines() if known is not None else [_unexplained(error)]
    if not quiet and not isinstance(known, OtherRankError):
        for line in lines:
            print(f"{prog}: error: {line}", file=sys.stderr, flush=True)
    return EXIT_INTERNAL if known is None else known.exit_code


def _unexplained(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = f"{text[:300]}..." if len(text) > 300 else text
    if is_out_of_memory(error):
        fix = "lower --micro-batch-size, --model.context or the size of the model"
        return f"out of memory: {text or 'no details'}; {fix}"
    fix = "run again with --debug for the traceback, and please report it"
    return f"internal error: {type(error).__name__}: {text} ({_place(error)}); {fix}"


def _explained(error: Exception) -> DttError | None:
    """The error as one of dtt's, where it is one or says as much."""
    if isinstance(error, DttError):
        return error
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("dtt"):
        return ConfigError(f"the Python package {error.name!r} is missing", "pip install dtt again")
    if isinstance(error, OSError) and error.errno in STORAGE_FIXES:
        name = f"{error.filename}: " if error.filename is not None else ""
        problem = (error.strerror or str(error)).lower()
        return StorageError(f"{name}{problem}", STORAGE_FIXES[error.errno])
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory did not suffice, a GPU's or the machine's."""
    # By name: naming torch's class would import torch.
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "t allocate memory" in str(error)


def _place(error: Exception) -> str:
    """The innermost line of dtt on the way to an error, as train/loop.py:57."""
    place, trace = "", error.__traceback__
    folder = os.path.dirname(__file__) + os.sep
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file.startswith(folder) or not place:
            place = f"{file.removeprefix(folder)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
