"""The data loader alone: tokens per second that it delivers, against what a training step takes."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import train_step
from shapes import QUICK, SHAPES, Shape
from table import (
    in_process,
    median,
    parser,
    print_heading,
    print_table,
    ratio,
    take_turns,
    time_calls,
)

from dtt.data.loader import Loader
from dtt.data.windows import ContiguousWindows

STREAM = 20_000_000
"""Tokens: more than a CPU's cache holds."""


def delivered(shape: Shape, folder: Path, seconds: float, tokens: int) -> float:
    """Return the tokens/s of `Loader.iter_from`, which prepares batches in its thread."""
    stream = train_step.random_stream(folder, shape.vocab, tokens)
    batches = Loader([ContiguousWindows(stream, shape.context, 0)], shape.batch, 0).iter_from(0)
    samples = time_calls(lambda: next(batches), seconds=seconds, warmup=10, block=50)
    batches.close()
    return shape.tokens / median(samples)


def consumed(shape: Shape, threads: int, seconds: float) -> float:
    """Return the tokens/s of dtt's training step, in a process of its own."""
    spec = {"shape": asdict(shape), "variant": train_step.OURS, "device": "cpu"}
    spec |= {"threads": threads, "seconds": seconds}
    return shape.tokens / float(in_process(train_step.__file__, spec)["seconds"])


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--shape", choices=SHAPES, action="append", help="default: all three")
    asked.add_argument("--consumes", type=float, help="tokens/s of a step, instead of measuring it")
    options = asked.parse_args()
    quick, rounds = options.quick, options.rounds or (1 if options.quick else 3)
    torch.set_num_threads(options.threads)
    print_heading("Data loader", options.threads, quick)
    rows = []
    for name in options.shape or list(SHAPES):
        shape = QUICK if quick else SHAPES[name]
        length, seconds = (100_000, 0.1) if quick else (STREAM, 5.0)

        def measure(what: str, shape: Shape = shape, seconds: float = seconds) -> float:
            if what == "step":
                return options.consumes or consumed(shape, options.threads, seconds)
            with tempfile.TemporaryDirectory() as folder:
                return delivered(shape, Path(folder), seconds, length)  # noqa: B023

        found = take_turns(["loader", "step"], measure, rounds)
        loader, step = median(found["loader"]), median(found["step"])
        rows.append([name, f"{shape.batch} x {shape.context}", loader, step, ratio(loader, step)])
    print_table(["shape", "batch", "loader, tokens/s", "step, tokens/s", "ratio"], rows)


if __name__ == "__main__":
    main()
