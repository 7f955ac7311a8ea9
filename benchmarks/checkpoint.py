"""Saving a checkpoint while training goes on: what the loop waits, and when it is durable.

The state is that of AdamW (weights and two moments, 12 bytes a parameter). The limits are a plain
copy of as many bytes in memory, and a plain file of as many bytes, written and synced.
"""

from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from shapes import QUICK, SHAPES
from table import median, note, parser, print_heading, print_table, ratio
from train_step import dtt_step, dtt_stepper, random_stream

from dtt.training.checkpoint import Checkpoints


def copy_seconds(size: int) -> float:
    """Return the best time to copy `size` bytes in memory that is there already."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        target.copy_(source)
        found.append(time.perf_counter() - begin)
    return min(found)


def write_seconds(folder: Path, size: int) -> float:
    """Return the time to write one file of `size` bytes, synced."""
    block = os.urandom(1 << 20) * 8
    begin = time.perf_counter()
    with (folder / "plain").open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    (folder / "plain").unlink()
    return seconds


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--step-seconds", type=float, help="instead of measuring training steps")
    asked.add_argument("--folder", type=Path, help="write below this folder (default: TMPDIR)")
    options = asked.parse_args()
    quick, rounds = options.quick, options.rounds or (2 if options.quick else 4)
    shape = QUICK if quick else SHAPES["gpt2-124m"]
    print_heading("Checkpoint", options.threads, quick)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        model, stepper = dtt_stepper(shape, options.threads)
        step = dtt_step(stepper, shape, random_stream(folder, shape.vocab))
        step()  # the optimizer has its state from now on
        tensors = {"model": model.state_dict(), "optimizer": stepper.optimizer.named_state()}
        size = sum(t.nbytes for group in tensors.values() for t in group.values())
        figures = measure(folder, tensors, step, rounds, options.step_seconds)
        copy, write = copy_seconds(size), write_seconds(folder, size)
    print(f"{size / 1e9:.2f} GB of state, {rounds} saves\n")
    alone = median(figures["step alone"])
    rows: list[list[Any]] = [
        ["limit: copy of the state in memory", f"{copy:.3f} s", ratio(copy, alone)],
        ["limit: a plain file of that size, synced", f"{write:.3f} s", ratio(write, alone)],
    ]
    for what, seconds in figures.items():
        rows.append([what, f"{median(seconds):.3f} s", ratio(median(seconds), alone)])
    print_table(["what", "median", "in training steps"], rows)


def wait_for(path: Path) -> float:
    """Return when `path` came to be."""
    while not path.exists():
        time.sleep(0.005)
    return time.perf_counter()


def measure(
    folder: Path, tensors: Any, step: Any, rounds: int, step_seconds: float | None
) -> dict[str, list[float]]:
    """Save `rounds` times in the background of training; return the seconds by what they are."""
    checkpoints = Checkpoints(folder / "checkpoints", keep=1, background=True, warn=note)
    checkpoints.reserve(tensors)
    found: dict[str, list[float]] = {
        "step alone": [step_seconds] if step_seconds else [],
        "the loop waits in save()": [],
        "until durable, with steps going on": [],
        "step during the save": [],
    }

    def timed(call: Any, what: str) -> None:
        begin = time.perf_counter()
        call()
        found[what].append(time.perf_counter() - begin)

    for number in range(1, rounds + 1):
        for _ in range(0 if step_seconds else 2):
            timed(step, "step alone")
        begin, committed = time.perf_counter(), folder / "checkpoints" / f"step-{number:08d}"
        timed(lambda n=number: checkpoints.save(n, tensors, {}, {}), "the loop waits in save()")
        watch = ThreadPoolExecutor(1).submit(wait_for, committed)
        while not watch.done():
            timed(step, "step during the save")
        checkpoints.finish()
        found["until durable, with steps going on"].append(watch.result() - begin)
        note(f"save {number}/{rounds}: {found['the loop waits in save()'][-1]:.3f} s")
    return {what: seconds for what, seconds in found.items() if seconds}


if __name__ == "__main__":
    main()
