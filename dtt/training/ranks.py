"""A checkpoint of many ranks: each writes what it has into one folder, the first one finishes it.

Ranks tell each other through files in that folder, so that they need not wait for each other in the
training loop. The folder must be one that all of them see.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtt import storage
from dtt.errors import DttError, StorageError
from dtt.storage import Written
from dtt.training.snapshot import Group, Rows, write_tensors

PATIENCE = 600.0
"""Seconds that the first rank waits for the others' files."""
PAUSE = 0.02


@dataclass(frozen=True)
class Report:
    """What a rank has written: by group its file, and what is in it."""

    files: dict[str, tuple[str, Written, Rows]]


def write_parts(work: Path, rank: int, ranks: int, groups: Mapping[str, Group]) -> Report:
    """Write a rank's tensors, a file per group; of several ranks, their names say whose it is."""
    found = {}
    for group, content in groups.items():
        name = _file(group, rank, ranks)
        found[group] = (name, *write_tensors(work / name, content))
    return Report(found)


def contribute(work: Path, rank: int, ranks: int, groups: Mapping[str, Group]) -> None:
    """Write a rank's parts and report them to the first rank, or why it could not."""
    try:
        done: Any = write_parts(work, rank, ranks, groups).files
    except Exception as error:  # whatever it is, the first rank waits for a report
        done = {"error": repr(error), "fix": "see the log of the run"}
        if isinstance(error, DttError):
            done = {"error": error.what, "fix": error.fix}
        for group in groups:  # on a full disk the report needs their room
            with suppress(StorageError):
                storage.remove(work / _file(group, rank, ranks))
    storage.write_atomic(_report(work, rank), json.dumps(done))


def collect(work: Path, ranks: int) -> list[Report]:
    """Wait for the other ranks' reports, and return them; StorageError if one could not write."""
    found, deadline = [], time.monotonic() + PATIENCE
    for rank in range(1, ranks):
        path = _report(work, rank)
        while not path.exists():
            if time.monotonic() > deadline:
                raise StorageError(
                    f"rank {rank} has not written its part of {work} in {PATIENCE:.0f} s",
                    "all ranks must see the run folder: put it on a file system that they share",
                )
            time.sleep(PAUSE)
        rows = json.loads(path.read_text(encoding="utf-8"))
        if "error" in rows:
            raise StorageError(f"rank {rank}: {rows['error']}", rows["fix"])
        files = {g: (name, Written(*written), rest) for g, (name, written, rest) in rows.items()}
        found.append(Report(files))
        storage.remove(path)
    return found


def _file(group: str, rank: int, ranks: int) -> str:
    middle = f"-{rank + 1:05d}-of-{ranks:05d}" if ranks > 1 else ""
    return f"{group}{middle}.safetensors"


def _report(work: Path, rank: int) -> Path:
    return work / f"rank-{rank}.json"
