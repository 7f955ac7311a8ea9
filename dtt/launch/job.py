"""What is to be started, in the same words for every engine."""

from __future__ import annotations

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
    ranks: int = 1
    """Processes per node: one per GPU, or what --ranks-per-node says."""
    gpus: int = 0
    """GPUs per node; 0: CPUs only."""
    python: str = sys.executable
    """The interpreter that the nodes run, with dtt installed."""

    @property
    def train(self) -> tuple[str, ...]:
        """Return the command of one rank, without what tells it which rank it is."""
        return (self.python, "-m", "dtt", "train", *self.arguments)
