"""Slurm: a batch script for a run, which goes on by itself until the run is complete."""

from __future__ import annotations

import argparse
import math
import re
import shlex
import subprocess
from collections.abc import Sequence

from dtt.config.parser import at_least
from dtt.errors import EXIT_DONE, ConfigError
from dtt.launch.attempts import record_of
from dtt.launch.job import Job
from dtt.launch.shell import exports
from dtt.launch.slurm_script import Words, quoted, stage_script, train_script
from dtt.metrics.progress import Progress, read_progress
from dtt.storage import make_folder

EXAMPLES = (
    "dtt launch slurm -c run.yaml --nodes 4 --gpus-per-node 8 --time 12:00:00",
    "dtt launch slurm -c run.yaml --nodes 4 --gpus-per-node 8 --print > train.sh",
    "dtt launch slurm -c run.yaml --nodes 2 --gpus-per-node 8 --chain",
    "dtt launch slurm -c run.yaml --gpus-per-node 8 --setup 'module load cuda' --account lab",
)
LATENESS = 60
"""Seconds by which Slurm may be wrong: it looks at the time every 30 s, and on busy clusters less
often."""
UNKNOWN = 300
"""Seconds before the wall time at which a run that has never saved is asked to stop."""
LEAST = 120
STAGES = ("download", "tokenize", "train")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add Slurm's own flags."""
    add = parser.add_argument
    add("--time", metavar="LIMIT", help="wall time, as sbatch takes it: 90, 12:00:00, 2-00:00")
    add("--partition", metavar="NAME")
    add("--account", metavar="NAME")
    add("--qos", metavar="NAME")
    add("--cpus-per-task", type=at_least(1), metavar="N", help="cores of each rank")
    add("--mem", metavar="SIZE", help="memory of each node, such as 64G")
    add("--constraint", metavar="FEATURES", help="features that nodes must have")
    add("--exclude", metavar="NODES", help="nodes not to be used")
    add("--exclusive", action="store_true", help="share nodes with no other job")
    add(
        "--signal-seconds",
        type=at_least(1),
        metavar="S",
        help="seconds before the wall time at which the run saves and goes back into the queue "
        f"(default: from what this run measured; {UNKNOWN}, or a third of --time, where it did "
        "not run yet)",
    )
    add("--after", metavar="JOBID", help="start when this job has ended well")
    add("--chain", action="store_true", help="download, tokenize and train, one after the other")
    add(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="a line of shell before anything starts, such as 'module load cuda'; may be repeated",
    )


def write(job: Job, options: argparse.Namespace) -> str:
    """Return the batch script; with --chain the three of them, each with a line that says which."""
    scripts = _scripts(job, options)
    if not options.chain:
        return scripts["train"]
    return "\n".join(f"### {name}.sh\n{text}" for name, text in scripts.items())


def run(job: Job, options: argparse.Namespace, text: str) -> int:
    """Submit the job (with --chain three), and say how to follow it."""
    make_folder(job.folder / "logs")  # Slurm fails a job whose log has no folder
    before = options.after
    if options.chain:
        for name, script in _scripts(job, options).items():
            before = submit(script, before)
            print(f"submitted job {before}: {name}")
    else:
        before = submit(text)
        print(f"submitted job {before}: {_size(job)}, {job.folder}")
    record_of(job.folder).add("submitted", job=before, chain=before)
    for line in (
        f"dtt launch status {job.folder}",
        f"dtt launch logs {job.folder} --rank 0 --follow",
        f"scancel {before}    # it saves first, and does not come back",
    ):
        print(f"  {line}")
    return EXIT_DONE


def submit(script: str, after: str | None = None) -> str:
    """Hand a script to sbatch, to start when `after` has ended well; return the job's id."""
    words = ["sbatch", "--parsable"]
    if after is not None:
        words += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    try:
        done = subprocess.run(words, input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(
            "there is no sbatch on this machine",
            "run this on a login node of the cluster, or --print the script and copy it there",
        ) from None
    if done.returncode:
        problem = " ".join(line.removeprefix("sbatch: error: ") for line in _lines(done.stderr))
        raise ConfigError(f"Slurm refused the job: {problem}", "see `sinfo` for what there is")
    return done.stdout.strip().split(";")[0]


def signal_seconds(options: argparse.Namespace, progress: Progress | None) -> int:
    """Return how many seconds before the wall time the run is to be asked to stop.

    A step under way, the next one, a save under way and one more; what was measured, doubled; and
    Slurm's own lateness. ConfigError if the wall time has no room for it.
    """
    limit = seconds_of(options.time) if options.time else math.inf
    if options.signal_seconds is not None:
        wanted = options.signal_seconds
    elif progress is not None and progress.save_seconds is not None:
        busy = 2 * (progress.step_seconds + progress.save_seconds)
        wanted = max(LEAST, LATENESS + math.ceil(2 * busy))
    else:
        return int(max(1, min(UNKNOWN, limit / 3)))
    if wanted * 2 > limit and options.signal_seconds is None:
        wanted_time = math.ceil(2 * wanted / 60)
        raise ConfigError(
            f"--time {options.time} is too short: this run needs {wanted} s of it to save "
            f"(a save took {progress.save_seconds if progress else 0:.0f} s)",
            f"give at least --time {wanted_time}, or --signal-seconds",
        )
    if wanted >= limit:
        raise ConfigError(
            f"--signal-seconds {wanted} is not before the end of --time {options.time}",
            "give a smaller one",
        )
    return int(wanted)


def seconds_of(limit: str) -> float:
    """Read a time as sbatch does: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; 0 and words: no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        if limit.upper() in ("UNLIMITED", "INFINITE"):
            return math.inf
        raise ConfigError(f"--time {limit!r} is not a time", "give it as 90, 12:00:00 or 2-00:00")
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return int(days) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(parts) == 3:
        return parts[0] * 3600 + parts[1] * 60 + parts[2]
    minutes, seconds = [*parts, 0][:2]
    return minutes * 60 + seconds or math.inf


def _scripts(job: Job, options: argparse.Namespace) -> dict[str, str]:
    """Return the scripts of a job by name; those before training only with --chain."""
    logs = str(job.folder / "logs").replace("%", "%%")
    seconds = signal_seconds(options, read_progress(job.folder))
    python = shlex.quote(job.python)
    setup = (*options.setup, *filter(None, [exports(job.environment).rstrip("\n")]))
    words = Words(python, quoted(job.arguments), shlex.quote(str(job.folder)), setup)
    header = _resources(job, options) | {
        "requeue": "",
        "open-mode": "append",
        "signal": f"B:USR1@{seconds}",
        "output": f"{logs}/slurm-%j.log",
    }
    after = {}
    if options.after:
        after = {"dependency": f"afterok:{options.after}", "kill-on-invalid-dep": "yes"}
    if not options.chain:
        return {"train": train_script(header | after, words)}
    data = Words(python, quoted(_of_data(job.arguments)), setup=words.setup)
    found = {}
    for name in STAGES[:2]:
        one = Job(job.name, job.folder, job.arguments, job.nodes if name == "tokenize" else 1)
        stage = _resources(one, options) | {
            "job-name": f"{job.name}-{name}",
            "open-mode": "append",
            "output": f"{logs}/{name}-%j.log",
        }
        found[name] = stage_script(stage, data, name, shared=name == "tokenize")
    return found | {"train": train_script(header, words)}


def _resources(job: Job, options: argparse.Namespace) -> dict[str, str | int | None]:
    named = ("time", "partition", "account", "qos", "mem", "constraint", "exclude")
    rows: dict[str, str | int | None] = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.ranks,
        "gpus-per-node": job.gpus or None,
        "cpus-per-task": options.cpus_per_task,
    }
    rows |= {name: getattr(options, name) for name in named}
    return rows | {"exclusive": "" if options.exclusive else None}


def _of_data(arguments: Sequence[str]) -> list[str]:
    """Return a training command's arguments without those that only `dtt train` knows."""
    words, kept = iter(arguments), []
    for word in words:
        if word == "--resume":
            next(words, None)
        elif not word.startswith("--resume="):
            kept.append(word)
    return kept


def _size(job: Job) -> str:
    nodes = f"{job.nodes} node{'s' * (job.nodes > 1)}"
    return f"{nodes} x {job.ranks} rank{'s' * (job.ranks > 1)}"


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
