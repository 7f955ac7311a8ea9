"""Two ranks of one thread each against one rank of two threads: `dtt train`, same global batch.

Tokens/s are those of the console lines of the run, the first two left out; validation and
checkpoints come at the end and are not in them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from shapes import QUICK, SHAPES, Shape
from table import median, parser, print_heading, print_table, ratio, take_turns

DIVISIONS = {
    "1 rank x 2 threads": ("--world-size", "1", "--training.threads", "2"),
    "2 ranks x 1 thread": ("--world-size", "2", "--training.threads", "1"),
}
CORPUS = ("-d", "tales", "--data.source.stories", "2000", "--tokenizer", "char")
QUIET = ("--evaluation.every", "0", "--checkpoint.every", "0", "--sample.prompts", "[]")
SPEED = re.compile(r"([\d.]+)([kMB]?) tok/s")
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9}


def model_flags(shape: Shape) -> list[str]:
    """Return the flags of `dtt train` for a shape; the vocabulary is the corpus's."""
    settings = {
        "model.layers": shape.layers,
        "model.dim": shape.dim,
        "model.heads": shape.heads,
        "model.context": shape.context,
        "model.positions.name": "learned",
        "model.activation": "gelu",
        "model.tied-head": "true",
        "training.batch-size": shape.batch,
        "optimizer.name": "adamw",
    }
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


def speeds(text: str) -> list[float]:
    """Return the tokens/s of the step lines of a run's console."""
    return [float(number) * UNITS[unit] for number, unit in SPEED.findall(text)]


def measure(division: str, shape: Shape, folder: Path, steps: int, every: int) -> float:
    """Return the median tokens/s of one run."""
    command = [sys.executable, "-m", "dtt", "train", *CORPUS, *model_flags(shape), *QUIET]
    command += ["--max-steps", str(steps), "--logging.every", str(every)]
    command += [*DIVISIONS[division], "--name", "ranks", "--fresh", "--evaluation.max-tokens", "1"]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}")
    return median(speeds(done.stdout)[2:])


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--shape", choices=list(SHAPES)[:2], action="append", help="default: both")
    options = asked.parse_args()
    quick, rounds = options.quick, options.rounds or (1 if options.quick else 5)
    print_heading("Ranks", options.threads, quick)
    rows = []
    for name in options.shape or list(SHAPES)[:2]:
        shape = QUICK if quick else SHAPES[name]
        # Some 20 seconds of steps per run, in 10 console lines.
        every = 2 if quick else {"tiny-0.8m": 100, "nanogpt-10m": 5}[name]
        with tempfile.TemporaryDirectory() as folder:
            found = take_turns(
                list(DIVISIONS),
                lambda d, s=shape, f=folder, e=every: measure(d, s, Path(f), 10 * e, e),
                rounds,
            )
        one, two = found.values()
        for division, values in found.items():
            against = "" if values is one else ratio(median(two), median(one))
            rows.append([name, division, max(values), median(values), against])
    print_table(["shape", "division", "tokens/s, best", "median", "to one rank"], rows)


if __name__ == "__main__":
    main()
