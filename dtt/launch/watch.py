"""`dtt launch status` and `dtt launch logs`: how a run stands, what its ranks say (no torch)."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtt.errors import EXIT_DONE, ConfigError
from dtt.launch.attempts import record_of
from dtt.launch.slurm_verdict import Ended, describe
from dtt.metrics.meter import short_count, short_duration
from dtt.metrics.progress import Progress, read_progress
from dtt.runs import newest_step
from dtt.storage import storage_errors

SHOWN = 5
"""Attempts that are listed, the newest."""
TAIL = 65536
"""Bytes at the end of a log in which the last lines are looked for."""
PAUSE = 0.5


def status(folder: Path) -> int:
    """Print where a run stands: its job, its steps, its attempts, and why it failed if it did."""
    now, progress = time.time(), read_progress(folder)
    rows = record_of(folder).rows()
    running, lines = _jobs(folder, rows)
    print(folder)
    for line in [*lines, *_standing(folder, progress, running, now), *_attempts(rows, now)]:
        print(f"  {line}")
    if not running:
        for line in _errors(folder, rows):
            print(f"  {line}")
    return EXIT_DONE


def logs(folder: Path, rank: int, follow: bool) -> int:
    """Print what a rank has said, and with `follow` what it says from now on, until Ctrl-C."""
    found = ranks_with_logs(folder)
    if rank not in found:
        has = f"ranks {found[0]} to {found[-1]} have one" if found else "no rank has one"
        where = folder / "logs"
        raise ConfigError(
            f"rank {rank} has no log in {where}: {has}",
            "choose one of them" if found else f"{where}/train.log has what rank 0 said",
        )
    path = folder / "logs" / f"rank-{rank}.log"
    with storage_errors(path, "read"), path.open(encoding="utf-8", errors="replace") as file:
        try:
            while True:
                while text := file.read(TAIL):
                    print(text, end="", flush=True)
                if not follow:
                    return EXIT_DONE
                time.sleep(PAUSE)
        except KeyboardInterrupt:  # the way to end it
            return EXIT_DONE


def ranks_with_logs(folder: Path) -> list[int]:
    """Return the ranks that have a log in this run."""
    names = [path.name for path in (folder / "logs").glob("rank-*.log")]
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"rank-(\d+)\.log", name)))


def _jobs(folder: Path, rows: list[dict[str, Any]]) -> tuple[bool, list[str]]:
    """Return whether somebody is at work on the run or waits for it, and lines that say who."""
    jobs = list(dict.fromkeys(row["job"] for row in rows))
    lines = [_job_line(fields) for fields in _queue(jobs)] if jobs else []
    if lines:
        return True, lines
    holder = _holder(folder)
    if holder is not None:
        return True, [holder]
    return False, [f"job {jobs[-1]} is over" if jobs else "nobody on this machine trains it now"]


def _queue(jobs: list[str]) -> list[list[str]]:
    """Return state, reason, nodes and so on of those jobs that Slurm still has."""
    form = "%i|%T|%r|%N|%M|%l|%S|%D"
    words = ["squeue", "--noheader", f"--jobs={','.join(jobs[-20:])}", f"--format={form}"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 7]


def _job_line(fields: list[str]) -> str:
    job, state, reason, nodes, elapsed, limit, start, count = fields
    if state == "PENDING":
        when = f", from {start.replace('T', ' ')} on" if start not in ("N/A", "") else ""
        plural = "s" * (count != "1")
        return f"job {job}  waits for {count} node{plural} ({reason}{when})"
    return f"job {job}  {state.lower()} on {nodes}, {elapsed} of {limit}"


def _holder(folder: Path) -> str | None:
    """Say who holds the run's lock on this machine; None if nobody does.

    The kernel's table is read: trying the lock, even for a moment, could refuse a run that starts.
    """
    try:
        inode = (folder / "lock").stat().st_ino
        table = Path("/proc/locks").read_text(encoding="ascii").splitlines()
        if not any(f":{inode} " in line and "FLOCK" in line for line in table):
            return None
        holder = json.loads((folder / "lock").read_bytes())
        pid, host, began = holder["pid"], holder["host"], holder["started"]
    except (OSError, ValueError, KeyError):
        return None
    return f"process {pid} on {host} trains it, since {began}"


def _standing(folder: Path, progress: Progress | None, running: bool, now: float) -> Iterator[str]:
    if progress is None:
        yield "no step yet"
        return
    share = progress.step / progress.steps
    line = f"step {progress.step:,} of {progress.steps:,} ({share:.0%})"
    if running and progress.step < progress.steps:
        line += f"  {short_count(progress.tokens_per_second)} tok/s"
        line += f"  {short_duration(progress.seconds_left)} left"
    yield f"{line}  ({_ago(now - progress.time)})"
    newest = newest_step(folder)
    saved = (
        "" if progress.save_seconds is None else f", a save takes {_fine(progress.save_seconds)}"
    )
    yield f"newest checkpoint: {f'step {newest:,}' if newest else 'none'}{saved}"


def _attempts(rows: list[dict[str, Any]], now: float) -> Iterator[str]:
    """List the last attempts: where they ran, how far they came, how they ended."""
    found: list[str] = []
    begun: dict[str, Any] = {}
    for row in rows:
        if row["event"] == "begun":
            begun = row
        elif row["event"] == "ended" and begun:
            ended = Ended(row["code"], tuple(row["failed"]))
            why = row["why"] or describe(ended)
            found.append(
                f"attempt {len(found) + 1}: {','.join(begun['nodes'])}, steps {begun['step']:,} to "
                f"{row['step']:,}, ended {_ago(now - row['time'])}: {why}"
            )
            begun = {}
    if begun:
        nodes, since = ",".join(begun["nodes"]), _ago(now - begun["time"])
        found.append(
            f"attempt {len(found) + 1}: {nodes}, from step {begun['step']:,}, begun {since}"
        )
    yield from found[-SHOWN:]


def _errors(folder: Path, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Return the last lines that say why the run ended, where it did not end well."""
    ends = [row for row in rows if row["event"] == "ended"]
    if ends and ends[-1]["code"] == 0:
        return
    logs = folder / "logs"
    for path in sorted(logs.glob("slurm-*.log"), key=_touched)[-1:] or [*logs.glob("rank-*.log")]:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            text = file.read().decode("utf-8", "replace")
        said = [line for line in text.splitlines() if re.search(r"\berror: |^dtt: attempt", line)]
        for line in said[-4:]:
            yield f"{path.name}: {line}"


def _touched(path: Path) -> float:
    return path.stat().st_mtime


def _ago(seconds: float) -> str:
    return f"{short_duration(max(0.0, seconds))} ago"


def _fine(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 10 else short_duration(seconds)
