"""What is to be started, in the same words for every engine."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """One training run on some nodes; an engine makes a command, a script or a manifest of it."""

    name: str
    """Name of the run."""
    folder: Path
    """Folder of the run; logs of its ranks are below it."""
    arguments: tuple[str, ...]
    """What `dtt train` gets, as the user gave it: -c C and flags."""
    nodes: int = 1
    """Nodes; of an elastic job the most that it takes."""
    ranks: int = 1
    """Processes per node: one per GPU, or what --ranks-per-node says."""
    gpus: int = 0
    """GPUs per node; 0: CPUs only."""
    python: str = sys.executable
    """The interpreter that the nodes run, with dtt installed."""
    fewest_nodes: int | None = None
    """Of an elastic job the fewest nodes that it goes on with; None: not elastic."""
    directory: Path = Path(".")
    """Working directory of every rank; relative paths of the configuration start there."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables that every rank gets beside those of its machine."""
    config: str = ""
    """The resolved configuration as YAML, for machines that do not see the files behind
    `arguments`."""
    others: tuple[str, ...] = ()
    """Those of `arguments` that are no part of the configuration: --resume PATH."""

    @property
    def train(self) -> tuple[str, ...]:
        """Return the command of one rank, without what tells it which rank it is."""
        return (self.python, "-m", "dtt", "train", *self.arguments)

    @property
    def label(self) -> str:
        """Return the name as schedulers and DNS take it: a-z, 0-9 and -, 40 characters at most."""
        words = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return words[:40].strip("-") or "run"
