"""How far a run is, in RUN/progress.json: for those who look at it from outside (`dtt launch`).

A convenience that is replaced at every log line, not a record: the checkpoints are the truth.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "progress.json"


@dataclass(frozen=True)
class Progress:
    """Where a run stood when it last said so."""

    step: int
    steps: int
    """Optimizer steps that are planned."""
    tokens_per_second: float
    seconds_left: float
    step_seconds: float
    """Seconds of a step: the slowest mean between two log lines of this process."""
    save_seconds: float | None = None
    """Seconds from asking for a checkpoint until it was on the disk: the longest; None: no save."""
    time: float = 0.0
    """When it was written, in seconds since 1970."""

    def write(self, run: Path) -> None:
        """Replace the file in the folder `run`; where that fails the old one stays, or none."""
        path = run / FILE
        temporary = path.with_suffix(".tmp")
        with suppress(OSError):
            text = json.dumps({**asdict(self), "time": time.time()})
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(path)


def read_progress(run: Path) -> Progress | None:
    """Return what a run last said of itself; None if it said nothing yet."""
    try:
        return Progress(**json.loads((run / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
