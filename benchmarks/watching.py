"""What it costs to watch a run: everything on against the same run with everything off.

Everything: TensorBoard, W&B (offline), the machine's figures, and norms of each layer every 100
steps, of 10M parameters. Both write metrics.jsonl and a line every 10 steps. Each run is a process
of its own; a round is a pair of them, and which comes first changes from round to round. The time
is that of the steps after the first 20. Steps alone differ by more from run to run than watching
costs, so what is compared is the CPU time of watching itself: what the training thread spends in
its calls of loggers and norms, and all that other threads and other processes (W&B's) spend. So
matrices are multiplied by one thread, whatever `--threads` says: others would be counted.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import psutil
from table import (
    in_process,
    median,
    note,
    parser,
    print_heading,
    print_table,
    summarize,
    summary,
)

SETTINGS = {
    "name": "watched",
    "tokenizer.name": "char",
    "data.workers": "1",
    "data.source.name": "text",
    "data.source.path": "text.txt",
    "model.positions.name": "learned",
    "model.activation": "gelu",
    "evaluation.every": "0",
    "evaluation.max_tokens": "1000",
    "checkpoint.every": "0",
    "sample.prompts": "[]",
    "training.device": "cpu",
    "optimizer.name": "adamw",
}
SIZES = {
    True: {"layers": 2, "dim": 64, "heads": 2, "context": 64, "batch": 4, "steps": 60, "norms": 20},
    False: {
        "layers": 6, "dim": 384, "heads": 6, "context": 256, "batch": 2, "steps": 220, "norms": 100,
    },
}  # fmt: skip
P, T = ParamSpec("P"), TypeVar("T")
WARMUP = 20
VARIANTS = ("off", "on")
KINDS = ("wall", "calls", "threads", "processes")


class Clock:
    """Seconds until now: of the wall clock, and on the CPU for watching."""

    def __init__(self) -> None:
        self.calls = 0.0
        """Of the thread that trains, in calls that have gone through `counted`."""

    def counted(self, call: Callable[P, T]) -> Callable[P, T]:
        def wrapped(*given: P.args, **named: P.kwargs) -> T:
            begin = time.thread_time()
            try:
                return call(*given, **named)
            finally:
                self.calls += time.thread_time() - begin

        return wrapped

    def read(self) -> dict[str, float]:
        """For the thread that trains; of processes that it has started, those that still run."""
        processes = 0.0
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                processes += times.user + times.system
        threads = time.process_time() - time.thread_time()
        found = {"calls": self.calls, "threads": threads, "processes": processes}
        return {"wall": time.perf_counter(), **found}


def work(spec: dict[str, Any]) -> dict[str, float]:
    """Train in this process; return seconds a step of each kind."""
    from dtt.config.load import load_config
    from dtt.training import loop
    from dtt.training.launch import train
    from dtt.training.state import Run

    size, marks, clock = spec["size"], [], Clock()
    report = clock.counted(Run.report)

    def marked(self: Run, readings: Any) -> None:
        report(self, readings)
        marks.append((self.state.step, clock.read()))

    Run.report = marked  # type: ignore[method-assign]
    loop.log_norms = clock.counted(loop.log_norms)
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    wanted = {f"model.{key}": str(size[key]) for key in ("layers", "dim", "heads", "context")}
    wanted |= {"training.batch_size": str(size["batch"]), "training.threads": str(spec["threads"])}
    wanted |= {"training.max_steps": str(size["steps"]), "logging.level": "warning"}
    if spec["on"]:
        wanted |= {f"logging.{name}": "true" for name in ("tensorboard", "wandb", "resources")}
        wanted["logging.norms_every"] = str(size["norms"])
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        draw = random.Random(0)
        text = "".join(chr(draw.randint(32, 96)) for _ in range(200_000))
        Path("text.txt").write_text(text, encoding="utf-8")
        flags = {name: (f"--{name}", text) for name, text in {**SETTINGS, **wanted}.items()}
        train(load_config(overrides=flags))
        os.chdir("/")
    (first, begin), (last, end) = next(mark for mark in marks if mark[0] >= WARMUP), marks[-1]
    return {kind: (end[kind] - begin[kind]) / (last - first) for kind in KINDS}


def main() -> int:
    asked = parser(__doc__)
    asked.add_argument("--worker", type=json.loads, help="for the processes that are started")
    options = asked.parse_args()
    if options.worker is not None:
        print(json.dumps(work(options.worker)))
        return 0
    options.threads = 1
    print_heading("Watching a run", options.threads, options.quick)
    rounds = options.rounds or (1 if options.quick else 4)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for number in range(rounds):
        for name in VARIANTS if number % 2 == 0 else reversed(VARIANTS):
            spec = {"on": name == "on", "size": SIZES[options.quick], "threads": options.threads}
            found[name].append(in_process(__file__, spec))
            note(f"round {number + 1}/{rounds}  {name}: {found[name][-1]}")
    with summary(options.threads):
        middle = {
            name: {kind: 1000 * median(figure[kind] for figure in figures) for kind in KINDS}
            for name, figures in found.items()
        }
        totals = {n: sum(each.values()) - each["wall"] for n, each in middle.items()}
        rows = [[name, *each.values(), totals[name]] for name, each in middle.items()]
        heads = ["loggers", "ms a step", "CPU ms in calls", "threads", "processes", "all"]
        print_table(heads, rows)
        share = (totals["on"] - totals["off"]) / middle["off"]["wall"]
        what = "all loggers on, norms every 100 steps: CPU time to that of a step"
        summarize(what, f"{share:+.1%}", "under 2%")
    return 0


if __name__ == "__main__":
    sys.exit(main())
