"""What a check found: one line for people, figures for scripts, and how to mend it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from dtt.config.schema import Config
from dtt.doctor.bench import Bench
from dtt.errors import ConfigError, DataError, DttError, PeerError, StorageError
from dtt.place import Place

Status = Literal["ok", "warning", "failed", "skipped"]

SETUP, DATA, STORAGE, PEERS = (
    kind.exit_code for kind in (ConfigError, DataError, StorageError, PeerError)
)
"""What a failed check ends the command with, by the kind of the check."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    status: Status
    measured: str
    """What was measured, or why it was skipped."""
    mend: str = ""
    """How to mend it; never empty where the status is warning or failed."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """The same in numbers, with the unit in the name; what JSON can hold."""
    name: str = ""
    group: str = ""
    code: int = 0
    """Exit code that it stands for where it failed."""
    seconds: float = 0.0
    """What the check took."""


NONE: Mapping[str, Any] = MappingProxyType({})


def ok(measured: str, figures: Mapping[str, Any] = NONE, *, name: str = "") -> Finding:
    """All is well."""
    return Finding("ok", measured, "", dict(figures), name)


def warning(
    measured: str, mend: str, figures: Mapping[str, Any] = NONE, *, name: str = ""
) -> Finding:
    """Training works, but something is slower, tighter or riskier than it could be."""
    return Finding("warning", measured, mend, dict(figures), name)


def failed(
    measured: str, mend: str, figures: Mapping[str, Any] = NONE, *, name: str = ""
) -> Finding:
    """Training would not work."""
    return Finding("failed", measured, mend, dict(figures), name)


def skipped(reason: str, *, name: str = "") -> Finding:
    """It does not apply here, or could not be asked."""
    return Finding("skipped", reason, name=name)


@dataclass
class Subject:
    """What is examined: this machine, for one run; and what checks tell later ones."""

    config: Config
    """The run's settings; where these do not load, the defaults."""
    place: Place
    environ: Mapping[str, str]
    """As this process was started: meeting other ranks sets variables."""
    bench: Bench
    error: DttError | None = None
    """Why the settings do not load."""
    quick: bool = False
    """Look only, without measuring."""
    busy: float = 0.0
    """Cores that other programs kept busy before the examination began."""
    hub_answers: bool = True
    gpus: list[dict[str, Any]] = field(default_factory=list)
    parameters: int = 0
    """Of the run's model; 0: not known."""

    @property
    def ranks(self) -> int:
        """Ranks that the run would have."""
        alone = self.place.launcher == "none"
        return self.config.parallel.world_size if alone else self.place.ranks

    @property
    def ranks_here(self) -> int:
        """Ranks of the run on this machine."""
        return self.ranks if self.place.launcher == "none" else self.place.local_ranks


@dataclass(frozen=True)
class Check:
    """One thing to look at. What it raises is its failure."""

    name: str
    group: str
    code: int
    examine: Callable[[Subject], Iterable[Finding]]
    slow: bool = False
    """It measures for more than a moment; --quick leaves it out."""
