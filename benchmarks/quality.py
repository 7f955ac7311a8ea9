"""What a model has learned for its budget: the real `dtt train`, then `dtt evaluate`.

The tasks are literal command lines, so that each can be repeated by hand. The whole validation
split is measured.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from table import machine_line, note, parser, print_table

SHAPE = (
    *("--model.layers", "4", "--model.heads", "4", "--model.dim", "128", "--model.context", "64"),
    *("--batch-size", "12", "--dropout", "0", "--max-steps", "2000"),
)
# No validation, checkpoint or sample before the end.
PLAIN = ("--evaluation.every", "0", "--checkpoint.every", "0", "--sample.prompts", "[]")
SHAKESPEARE = (
    *("--tokenizer", "char", "--data.val-fraction", "0.1", "--data.split", "tail"),
    *SHAPE,
    *PLAIN,
)
TASKS: dict[str, tuple[str, ...]] = {
    # nanoGPT's train_shakespeare_char.py with its settings for a CPU.
    "shakespeare-nanogpt": (
        *SHAKESPEARE,
        *("--model.positions.name", "learned", "--model.norm", "layernorm"),
        *("--model.activation", "gelu", "--model.bias", "false", "--model.tied-head", "true"),
        *("--optimizer", "adamw", "--lr", "1e-3", "--optimizer.betas", "0.9,0.99"),
        *("--weight-decay", "0.1", "--training.grad-clip", "1.0"),
        *("--schedule", "cosine", "--warmup-steps", "100", "--schedule.min-lr-ratio", "0.1"),
    ),
    # The same tokens and the same size, with dtt's model and optimizer.
    "shakespeare-ours": (*SHAKESPEARE, "--optimizer", "muon", "--lr", "4e-3"),
    "tales-demo": (),
    # Ten times the steps on ten times the stories, so that none repeats. Its own evaluation is
    # the one at the end, on the thousand stories that the split then holds out.
    "tales-10x": (
        *("--max-steps", "{ten times the default}", "--data.source.stories", "200000"),
        *("--data.val-fraction", "0.005", *PLAIN),
    ),
}
DEFAULT_SEED = 1337
LIMITS = {
    "shakespeare-nanogpt": ("loss", 1.92),
    "shakespeare-ours": ("loss", 1.75),
    "tales-demo": ("above_floor", 0.25),
    "tales-10x": ("above_floor", 0.08),
}
"""What must be reached: a figure of `dtt evaluate --json`, and its largest value."""


def default_steps() -> int:
    """Return the optimizer steps of `dtt train` without arguments."""
    from dtt.config.schema import Config
    from dtt.training.run import DEFAULT_STEPS

    return Config().training.max_steps or DEFAULT_STEPS


def flags(task: str, text: str | None, *, quick: bool) -> list[str]:
    """Return the flags of a task; it runs for a few steps with `quick`."""
    given = list(TASKS[task])
    if "--max-steps" in given:
        steps = given.index("--max-steps") + 1
        given[steps] = given[steps] if given[steps].isdigit() else str(10 * default_steps())
    if task.startswith("shakespeare"):
        given = ["--data-path", str(text), *given]
    if quick:
        small = {"--max-steps": "3", "--warmup-steps": "1"}
        if not task.startswith("shakespeare"):
            small["--data.source.stories"] = "200"
        for flag, value in small.items():
            if flag in given:
                given[given.index(flag) + 1] = value
            else:
                given += [flag, value]
    return given


def dtt(*arguments: str, folder: Path, threads: int) -> str:
    """Run a dtt command in `folder` and return what it prints; its messages go to stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "dtt", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"dtt {' '.join(arguments)} ended with {done.returncode}\n{done.stdout}")
    return done.stdout


def run(task: str, text: str | None, folder: Path, options: Any, seed: int) -> dict[str, Any]:
    """Train and evaluate once; return the figures of the evaluation and the seconds of training."""
    given = [*flags(task, text, quick=options.quick), "--seed", str(seed), "--name", "run"]
    threads = ["--training.threads", str(options.threads)]
    # The corpus is made first: how long that takes is another benchmark's figure.
    dtt("tokenize", *given, folder=folder, threads=options.threads)
    begin = time.perf_counter()
    dtt("train", *given, *threads, "--fresh", folder=folder, threads=options.threads)
    seconds = time.perf_counter() - begin
    shown = dtt(
        "evaluate",
        "runs/run",
        "--batch-size",
        "64",
        "--json",
        folder=folder,
        threads=options.threads,
    )
    found: dict[str, Any] = json.loads(shown.splitlines()[-1])
    return found | {"seconds": seconds}


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--task", choices=TASKS, action="append", help="default: all")
    asked.add_argument("--text", metavar="FILE", help="tiny Shakespeare, for the two tasks on it")
    asked.add_argument(
        "--seeds", type=int, default=1, help="train this many times: the default seed, 1, 2, ..."
    )
    asked.add_argument("--show", action="store_true", help="only print the commands")
    options = asked.parse_args()
    text = str(Path(options.text).resolve()) if options.text else None
    tasks = options.task or [t for t in TASKS if text or not t.startswith("shakespeare")]
    if not text and any(task.startswith("shakespeare") for task in tasks):
        asked.error("the tasks on Shakespeare need --text FILE")
    if options.show:
        for task in tasks:
            print("dtt train", *flags(task, text, quick=options.quick))
        return
    print(f"## Quality\n\n{machine_line(options.threads)}\n", flush=True)
    rows = []
    for task in tasks:
        # The seed that `dtt train` takes if it is not told one (it is nanoGPT's too), then others.
        for seed in [DEFAULT_SEED, *range(1, options.seeds)]:
            folder = Path(tempfile.mkdtemp(prefix="dtt-quality-"))
            try:
                found = run(task, text, folder, options, seed)
            finally:
                shutil.rmtree(folder)
            figure, limit = LIMITS[task]
            above = found["above_floor"]
            rows.append(
                [
                    task,
                    seed,
                    found["step"],
                    f"{found['loss']:.4f}",
                    f"{found['bits_per_byte']:.4f}",
                    None if above is None else f"{above:.1%}",
                    f"{figure} <= {limit}: {'yes' if found[figure] <= limit else 'no'}",
                    f"{found['seconds']:.1f} s",
                ]
            )
            note(" ".join(str(cell) for cell in rows[-1]))
    heads = [
        "task",
        "seed",
        "steps",
        "loss",
        "bits/byte",
        "above the floor",
        "reached",
        "dtt train",
    ]
    print_table(heads, rows)


if __name__ == "__main__":
    main()
