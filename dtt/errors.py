"""What can go wrong, by the exit code that it ends with.

Every error says what happened, where, and how to mend it, in one line. The exit codes are a
contract with the scripts around dtt (docs/errors.md lists them).
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_PREEMPTED = 75
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130


class DttError(Exception):
    """A failure that dtt can explain: `what` happened, and how to mend it in `fix`."""

    exit_code = EXIT_INTERNAL

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what, fix)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}" if self.fix else self.what


class ConfigError(DttError):
    """A setting or a flag is missing, unknown or impossible."""

    exit_code = 2


class RankError(ConfigError):
    """A rank does not fit to the others of its launch; it says so itself, as they may not know."""


class DataError(DttError):
    """A text, a shard or a tokenizer cannot be used as input."""

    exit_code = 3


class CheckpointError(DttError):
    """A run folder or checkpoint is missing, invalid, unsafe or of something else."""

    exit_code = 4


class StorageError(DttError):
    """A file could not be written or read: disk full, no permission, I/O error."""

    exit_code = 5


class NumericError(DttError):
    """A loss or gradient is not finite, or a run diverged."""

    exit_code = 6


class PeerError(DttError):
    """Another rank died, hangs or never came; trying again may help."""

    exit_code = 7


class LostRankError(PeerError):
    """This rank is well, but has lost another one; that one's own message says more."""


class BusyError(DttError):
    """Another process is writing to the same run folder."""

    exit_code = 8


class OutOfMemoryError(DttError):
    """The machine or the GPU has less memory than the run needs."""


class OtherRankError(DttError):
    """Another rank failed and has said why; this one ends with the same exit code, silently."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another rank failed")
        self.exit_code = exit_code


class NoProgressError(DttError):
    """A run was restarted several times and made no new checkpoint; trying again will not help."""

    exit_code = 76
