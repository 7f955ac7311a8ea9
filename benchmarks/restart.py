"""What a loss and a stop cost: killed to the first new step, started to the first, asked to left.

Each is a whole job of two ranks: `dtt train --world-size 2`, and the same `dtt train` under
torchrun with --max-restarts (and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without which gloo's ranks
do not find each other again). The kill is `kill -9` of one rank in the midst of the run; the first
new step is the first that the ranks say after it. Asked to left is SIGTERM to the launcher, until
its exit with the checkpoint written, with a model of 30M parameters.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from table import median, note, parser, print_heading, print_table, ratio, take_turns

STEP = re.compile(r"step +([0-9]+)/")
OURS, THEIRS = "dtt train --world-size 2", "torchrun --nproc-per-node 2 -m dtt train"
RANKS = 2
WAYS = {
    OURS: ["-m", "dtt", "train", "--world-size", str(RANKS)],
    THEIRS: [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)),
        *("--max-restarts", "3", "-m", "dtt", "train"),
    ],
}
COMMON = (
    *("-d", "tales", "--data.source.stories", "2000", "--tokenizer", "char"),
    *("--batch-size", "8", "--evaluation.every", "0", "--sample.prompts", "[]"),
    *("--training.threads", "1", "--max-steps", "100000", "--logging.every", "1"),
)
SMALL = ("--model.layers", "2", "--model.dim", "64", "--model.heads", "2", "--model.context", "64")
MODEL_30M = (
    *("--model.layers", "9", "--model.dim", "512", "--model.heads", "8"),
    *("--model.context", "64", "--checkpoint.every", "0"),
)
BEFORE = 30
"""Steps before a rank is killed; there is a checkpoint at 20."""


class Job:
    """A running job, whose steps can be waited for."""

    def __init__(self, folder: Path, way: str, flags: tuple[str, ...]) -> None:
        own = ("--name", f"run-{time.time_ns():x}")
        environment = os.environ | {
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        self.begin = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, *WAYS[way], *COMMON, *own, *flags],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=(folder / "err").open("w"),
            text=True,
        )

    def await_step(self, least: int = 0) -> float:
        """Return when the next step is said whose number is `least` or more."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if (found := STEP.match(line)) and int(found[1]) >= least:
                return time.perf_counter()
        raise SystemExit(f"the job ended with {self.process.wait()}")

    def await_restart(self) -> float:
        """Return when the first step of the next start is said."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("continuing"):
                return self.await_step()
        raise SystemExit(f"the job ended with {self.process.wait()}")

    def workers(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def stop(self, number: signal.Signals) -> tuple[int, float]:
        """Send a signal; return the exit code and how long the job took to end."""
        begin = time.perf_counter()
        self.process.send_signal(number)
        self.process.communicate()
        return self.process.returncode, time.perf_counter() - begin


def killed(folder: Path, way: str) -> tuple[float, float]:
    """Return the seconds from start to the first step, and from a kill to the first new one."""
    job = Job(folder, way, (*SMALL, "--checkpoint.every", "10"))
    started = job.await_step() - job.begin
    job.await_step(BEFORE)
    begin = time.perf_counter()
    os.kill(job.workers()[1], signal.SIGKILL)
    restarted = job.await_restart() - begin
    job.stop(signal.SIGTERM)
    return started, restarted


def asked(folder: Path) -> tuple[float, float]:
    """Return the seconds of a step with a model of 30M, and from SIGTERM to its exit with 75."""
    job = Job(folder, OURS, MODEL_30M)
    before = job.await_step(3)
    step = job.await_step(4) - before
    code, seconds = job.stop(signal.SIGTERM)
    if code != 75:
        raise SystemExit(f"SIGTERM ended the job with {code}")
    return step, seconds


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def main() -> None:
    options = parser(__doc__).parse_args()
    rounds = options.rounds or (2 if options.quick else 20)
    print_heading("Losing a rank, and stopping", options.threads, options.quick)
    started: dict[str, list[float]] = {name: [] for name in WAYS}
    stopped: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(prefix="dtt-restart-") as folder:

        def measure(name: str) -> float:
            start, restart = killed(Path(folder), name)
            started[name].append(start)
            return restart

        restarted = take_turns(list(WAYS), measure, rounds)
        for number in range(max(2, rounds // 2)):
            stopped.append(asked(Path(folder)))
            note(f"asked to stop {number + 1}: {stopped[-1][1]:.3g} s")
    rows = []
    for what, found in (("start", started), ("kill -9 of a rank", restarted)):
        for name, values in found.items():
            against = ratio(median(values), median(found[THEIRS])) if name == OURS else "-"
            rows.append([what, name, len(values), median(values), p95(values), against])
    steps, ends = (list(column) for column in zip(*stopped, strict=True))
    for what, values in (("a step with 30M", steps), ("SIGTERM with 30M, saved and left", ends)):
        rows.append([what, OURS, len(values), median(values), p95(values), "-"])
    print_table(["from", "job", "n", "median, s", "p95, s", "of torchrun"], rows)


if __name__ == "__main__":
    main()
