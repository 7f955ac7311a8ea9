"""SkyPilot: a task for machines of a cloud, rented once or as managed spot machines.

The configuration goes along as it was resolved and checked here; the working directory is copied.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from dtt.config.parser import at_least
from dtt.config.yaml_text import Tree, write_manifest
from dtt.errors import ConfigError
from dtt.launch.job import Job
from dtt.launch.shell import folded
from dtt.launch.torchrun import PORT, agent

EXAMPLES = (
    "dtt launch skypilot -c run.yaml --gpus-per-node 8 --accelerator H100",
    "dtt launch skypilot -c run.yaml --nodes 2 --gpus-per-node 8 --accelerator H100 --managed \\\n"
    "      --bucket my-runs",
)
RUNS = "/dtt-runs"
"""Where the bucket is on the machines."""
RETRYABLE = [7, 75]
"""Exit codes after which another try may succeed (docs/errors.md)."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what the cloud must know beside the job."""
    add = parser.add_argument
    add("--accelerator", type=_accelerator, metavar="NAME", help="kind of GPU, such as H100")
    add("--cpus", type=at_least(1), metavar="N", help="CPU cores of each machine, at least")
    add("--infra", metavar="CLOUD", help="cloud, region or zone, as aws/us-east-1 (default: any)")
    add("--bucket", metavar="NAME", help="bucket for the runs, which outlives the machines")
    add(
        "--managed",
        action="store_true",
        help="spot machines, replaced when they are taken away (`sky jobs launch`)",
    )
    add(
        "--setup",
        default="python -m pip install dtt",
        metavar="COMMAND",
        help="how dtt gets onto a machine (default: python -m pip install dtt)",
    )


def write(job: Job, options: argparse.Namespace) -> str:
    """Return the task; ConfigError where it would lose the run, or lacks the kind of GPU."""
    if options.managed and not options.bucket:
        raise ConfigError(
            "--managed: the disk of a spot machine is lost with it",
            "give --bucket NAME, where the run is kept",
        )
    if job.gpus and not options.accelerator:
        raise ConfigError(
            f"no kind is given for {job.gpus} GPUs a node", "give --accelerator NAME, such as H100"
        )
    if options.accelerator and not job.gpus:
        raise ConfigError(
            f"--accelerator {options.accelerator}: no number is given", "give --gpus-per-node G"
        )
    resources: Tree = {}
    if job.gpus:
        resources["accelerators"] = f"{options.accelerator}:{job.gpus}"
    if options.cpus:
        resources["cpus"] = f"{options.cpus}+"
    if options.infra:
        resources["infra"] = options.infra
    if options.managed:
        resources |= {"use_spot": True, "job_recovery": {"recover_on_exit_codes": RETRYABLE}}
    task: Tree = {"name": job.label, "num_nodes": job.nodes, "workdir": "."}
    if resources:
        task["resources"] = resources
    if options.bucket:
        task["file_mounts"] = {RUNS: {"name": options.bucket, "mode": "MOUNT_CACHED"}}
    if job.environment:
        task["envs"] = dict(job.environment)
    return write_manifest({**task, "setup": options.setup, "run": _script(job, options)})


def run(job: Job, options: argparse.Namespace, text: str) -> int:
    """Launch the task; SkyPilot shows the price and asks."""
    if shutil.which("sky") is None:
        raise ConfigError("sky is not in PATH", 'pip install "skypilot[aws]", or of another cloud')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.yaml"
        path.write_text(text, encoding="utf-8")
        how = ["jobs", "launch", "-n"] if options.managed else ["launch", "-c"]
        return subprocess.run(["sky", *how, job.label, str(path)]).returncode


def _accelerator(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z][\w.-]*", text):
        raise argparse.ArgumentTypeError(f"should be a name such as H100, got {text!r}")
    return text


def _script(job: Job, options: argparse.Namespace) -> str:
    """Return what each machine runs."""
    runs = ("--dir", RUNS) if options.bucket else ()
    given = ("-c", ".dtt-launch.yaml", *runs, *job.others)
    inside = replace(job, python="python", arguments=given)
    own: list[str] = []
    text = f"cat >.dtt-launch.yaml <<'END_OF_CONFIG'\n{job.config}END_OF_CONFIG\n"
    if job.nodes == 1:
        words, train = agent(inside, ["--standalone"])
    else:
        words, train = agent(inside, ["--rdzv-backend", "c10d"])
        text += (
            'address() { echo "$SKYPILOT_NODE_IPS" | sed -n "${1}p"; } # of a node, from 1\n'
            'first=false\nif [ "$SKYPILOT_NODE_RANK" = 0 ]; then first=true; fi\n'
        )
        own += ["--rdzv-endpoint", f'"$(address 1):{PORT}"', "--rdzv-id", '"$SKYPILOT_TASK_ID"']
        own += ["--rdzv-conf", '"is_host=$first"']
        own += ["--local-addr", '"$(address $((SKYPILOT_NODE_RANK + 1)))"']
    parts = [*map(shlex.quote, words), *own], [*map(shlex.quote, train)]
    return f"{text}exec {folded(*parts)}\n"
