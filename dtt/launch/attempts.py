"""What is written of a job's attempts: RUN/logs/attempts.jsonl, a line for each event.

`submitted` when a job was handed to Slurm, `begun` and `ended` by the job itself. An attempt that
Slurm has ended (a node died) has no line of its own; the next one writes it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtt.launch.slurm_verdict import Attempt
from dtt.storage import make_folder, storage_errors


@dataclass(frozen=True)
class Record:
    """The attempts of a run, in the order in which they were."""

    path: Path

    def add(self, event: str, **facts: Any) -> None:
        """Append a line; StorageError if that fails."""
        make_folder(self.path.parent)
        line = json.dumps({"event": event, **facts, "time": round(time.time(), 3)})
        with storage_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Return all lines; a torn one is left out."""
        found = []
        if self.path.exists():
            with storage_errors(self.path, "read"):
                text = self.path.read_text(encoding="utf-8")
            for line in text.splitlines():
                try:
                    found.append(json.loads(line))
                except ValueError:
                    continue
        return found

    def open_attempt(self, chain: str) -> dict[str, Any] | None:
        """Return the `begun` line of the last attempt of a chain, if nobody wrote its end."""
        last = [row for row in self.rows() if row.get("chain") == chain][-1:]
        return last[0] if last and last[0]["event"] == "begun" else None


def record_of(run: Path) -> Record:
    """Return the record of the run in this folder."""
    return Record(run / "logs" / "attempts.jsonl")


def attempts_of(rows: Sequence[dict[str, Any]], chain: str) -> list[Attempt]:
    """Return the attempts of a chain of jobs that are over."""
    found, begun = [], 0
    for row in rows:
        if row.get("chain") != chain:
            continue
        if row["event"] == "begun":
            begun = row["step"]
        elif row["event"] == "ended":
            found.append(Attempt(row["job"], chain, begun, row["step"], tuple(row["failed"])))
    return found
