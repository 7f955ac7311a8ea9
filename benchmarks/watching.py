"""What it costs to watch a run: everything on against the same run with everything off.

Everything: TensorBoard, W&B (offline), the machine's figures, and norms of each layer every 100
steps, of 10M parameters. Both write metrics.jsonl and a line every 10 steps. Each run is a process
of its own; a round is a pair of them, and which comes first changes from round to round. The time
is that of the steps after the first 20, of the wall clock and on the CPU: of this process and of
those that it has started (W&B's). Other work on the machine disturbs the CPU time less.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

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
WARMUP = 20
VARIANTS = ("off", "on")
KINDS = ("wall", "cpu", "others")


def spent() -> dict[str, float]:
    """Return seconds until now: of the wall clock, and on the CPU by this process and by others
    that it has started and that still run."""
    others = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            others += times.user + times.system
    own = time.process_time()
    return {"wall": time.perf_counter(), "cpu": own + others, "others": others}


def work(spec: dict[str, Any]) -> dict[str, float]:
    """Train in this process; return seconds a step of each kind."""
    from dtt.config.load import load_config
    from dtt.training.launch import train
    from dtt.training.state import Run

    size, marks = spec["size"], []
    report = Run.report

    def marked(self: Run, readings: Any) -> None:
        report(self, readings)
        marks.append((self.state.step, spent()))

    Run.report = marked  # type: ignore[method-assign]
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
    print_heading("Watching a run", options.threads, options.quick)
    rounds = options.rounds or (1 if options.quick else 4)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for number in range(rounds):
        for name in VARIANTS if number % 2 == 0 else reversed(VARIANTS):
            spec = {"on": name == "on", "size": SIZES[options.quick], "threads": options.threads}
            found[name].append(in_process(__file__, spec))
            note(f"round {number + 1}/{rounds}  {name}: {found[name][-1]}")
    with summary(options.threads):
        rows = []
        for name, figures in found.items():
            cells: list[Any] = [name]
            for kind in ("wall", "cpu"):
                pairs = zip(figures, found["off"], strict=True)
                over = median(one[kind] / off[kind] - 1 for one, off in pairs)
                cells += [1000 * median(figure[kind] for figure in figures), f"{over:+.1%}"]
            rows.append([*cells, 1000 * median(figure["others"] for figure in figures)])
        heads = ["loggers", "ms a step", "to off, median of pairs", "CPU ms a step"]
        print_table([*heads, "to off, median of pairs", "of it in other processes"], rows)
        summarize("all loggers on, norms every 100 steps: CPU time a step", rows[1][4], "under 2%")
    return 0


if __name__ == "__main__":
    sys.exit(main())
