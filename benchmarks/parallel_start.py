"""How long ranks take from their fork to the end of their first step, and what of that is dtt's.

`dtt train` itself is run, on prepared data, with the moments noted in its ranks. What a later step
takes, and importing parts of torch in a rank, are left out of dtt's own.
"""

from __future__ import annotations

import builtins
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from table import in_process, median, print_table, summarize, take_turns

RANKS, STEPS = 4, 6
WAYS: dict[str, tuple[str, ...]] = {
    "DDP 4": (),
    "FSDP2 4": ("--parallel.shard", "4"),
    "TP 2 x FSDP2 2": ("--parallel.tensor", "2", "--parallel.shard", "2"),
}
RUN = (
    *("-d", "tales", "--data.source.stories", "500", "--tokenizer", "char"),
    *("--model.layers", "2", "--model.dim", "64", "--model.heads", "2", "--model.context", "64"),
    *("--batch-size", "8", "--evaluation.every", "0", "--checkpoint.every", "0"),
    *("--evaluation.max-tokens", "1", "--sample.prompts", "[]", "--name", "start", "--fresh"),
)


class Imports:
    """Counts the seconds that this process spends in importing modules of torch."""

    def __init__(self) -> None:
        self.seconds, self._inside, self._import = 0.0, False, builtins.__import__
        builtins.__import__ = self  # type: ignore[assignment]

    def __call__(self, name: str, *rest: Any, **named: Any) -> Any:
        if self._inside or name.partition(".")[0] != "torch":
            return self._import(name, *rest, **named)
        self._inside, begin = True, time.monotonic()
        try:
            return self._import(name, *rest, **named)
        finally:
            self._inside = False
            self.seconds += time.monotonic() - begin


def work(spec: dict[str, Any]) -> dict[str, float]:
    """Be `dtt train --world-size 4`, in which every rank writes down its moments."""
    from dtt import cli
    from dtt.launch import elastic_nodes
    from dtt.training.step import Stepper

    folder, flags = Path(spec["folder"]), ["--world-size", str(RANKS), "--max-steps", str(STEPS)]
    moments: list[float] = []
    imports, free_port, update = Imports(), elastic_nodes.free_port, Stepper.update

    def before_fork() -> int:
        imports.seconds = 0.0
        moments.append(time.monotonic())
        return free_port()

    def noted_update(stepper: Stepper, factor: float) -> None:
        update(stepper, factor)
        moments.append(time.monotonic())
        if len(moments) == 1 + STEPS:
            found = {"moments": moments, "imports": imports.seconds}
            _file(folder, stepper.runtime.rank).write_text(json.dumps(found), encoding="utf-8")

    elastic_nodes.free_port, Stepper.update = before_fork, noted_update  # type: ignore[method-assign]
    os.chdir(folder)
    if code := cli.main(["train", *RUN, *flags, *spec["flags"]]):
        raise SystemExit(f"dtt train ended with {code}")
    ranks = [json.loads(_file(folder, rank).read_text(encoding="utf-8")) for rank in range(RANKS)]
    # A step ends when the last rank is done with it.
    begin, first, *later = map(max, zip(*(rank["moments"] for rank in ranks), strict=True))
    return {
        "first": first - begin,
        "later": median(b - a for a, b in itertools.pairwise([first, *later])),
        "imports": max(rank["imports"] for rank in ranks),
    }


def _file(folder: Path, rank: int) -> Path:
    return folder / f"moments-{rank}.json"


def print_start(rounds: int, quick: bool) -> None:
    """Start each way in turn."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory(prefix="dtt-start-") as folder:

        def measure(name: str) -> float:
            spec = {"folder": folder, "flags": WAYS[name]}
            found[name].append(in_process(__file__, spec))
            return found[name][-1]["first"]

        take_turns(list(WAYS)[: 1 if quick else None], measure, rounds)
    rows: list[list[Any]] = []
    for name, runs in found.items():
        if not runs:
            continue
        middle = {key: median(run[key] for run in runs) for key in runs[0]}
        own = median(run["first"] - run["later"] - run["imports"] for run in runs)
        rows.append([name, own, middle["first"], middle["later"], middle["imports"]])
        summarize(f"start of {name}: dtt's own seconds to the first step", f"{own:.2f} s", "2 s")
    heads = ["`dtt train --world-size 4`", "dtt's own, s", "fork to the end of the first step, s"]
    print_table([*heads, "a later step, s", "importing torch in a rank, s"], rows)


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[2]))))
