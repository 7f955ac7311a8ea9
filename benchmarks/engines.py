"""Training by dtt's own loop and by Lightning's Trainer: the same run, in turn, in one process.

CPU time is that of the whole process, which other programs on the machine change less than they
change the wall time.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from table import median, parser, print_heading, print_table, ratio, summarize, take_turns

from dtt import Config, train
from dtt.metrics.meter import Meter

ENGINES = ("dtt", "lightning")
MODELS: dict[str, dict[str, Any]] = {
    "4 layers x 128 (the default)": {},
    "2 layers x 64": {"layers": 2, "dim": 64, "heads": 2, "context": 128},
}
SETTLED = 5
"""Steps at the start that are not counted."""


def config_of(
    model: dict[str, Any], engine: str, forwards: int, quick: bool, threads: int
) -> Config:
    """The run that is measured: no validation, no samples, one checkpoint at its end."""
    training = {"batch_size": 8, "accumulation": forwards, "max_steps": 12 if quick else 60}
    return Config.model_validate(
        {
            "name": engine,
            "model": model,
            "data": {"source": {"name": "tales", "stories": 300 if quick else 3000}},
            "training": {**training, "engine": engine, "threads": threads, "device": "cpu"},
            "evaluation": {"every": 0, "max_tokens": 2000},
            "checkpoint": {"every": 0},
            "sample": {"prompts": []},
            "logging": {"level": "error"},
        }
    )


def milliseconds(config: Config) -> tuple[float, float, int]:
    """Return the medians of a step's wall time and CPU time, and its target tokens."""
    seen: list[tuple[float, float]] = []
    tokens, add = 0, Meter.add

    def note(self: Meter, count: int) -> None:
        nonlocal tokens
        tokens = count
        seen.append((time.perf_counter(), time.process_time()))
        add(self, count)

    Meter.add = note  # type: ignore[method-assign]
    try:
        train(config, fresh=True)
    finally:
        Meter.add = add  # type: ignore[method-assign]
    pairs = list(zip(seen[SETTLED:], seen[SETTLED + 1 :], strict=False))
    wall, work = (1e3 * statistics.median(b[i] - a[i] for a, b in pairs) for i in (0, 1))
    return wall, work, tokens


def compare(name: str, forwards: int, options: Any) -> list[list[Any]]:
    """Return a row of the table for each engine."""
    rounds = options.rounds or (1 if options.quick else 5)
    found: dict[str, list[tuple[float, float, int]]] = {engine: [] for engine in ENGINES}

    def measure(engine: str) -> float:
        config = config_of(MODELS[name], engine, forwards, options.quick, options.threads)
        found[engine].append(milliseconds(config))
        return found[engine][-1][0]

    take_turns(list(ENGINES), measure, rounds)
    rows, first = [], None
    for engine in ENGINES:
        wall, work = (median(figures[i] for figures in found[engine]) for i in (0, 1))
        first = first or (wall, work)
        speed = f"{1e3 * found[engine][0][2] / wall:,.0f}"
        shares = [ratio(first[0], wall), ratio(first[1], work)]
        rows.append([name, forwards, engine, wall, work, speed, *shares])
    summarize(f"{name}, {forwards} forwards: Lightning's tokens/s of dtt's", rows[-1][6])
    return rows


def main() -> None:
    options = parser(__doc__).parse_args()
    print_heading("Engines", options.threads, options.quick)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rows = [row for name in MODELS for n in (1, 4) for row in compare(name, n, options)]
        os.chdir(Path("/"))
    heads = ["model", "forwards", "engine", "ms a step", "CPU ms", "tokens/s"]
    print_table([*heads, "of dtt's speed", "by CPU time"], rows)


if __name__ == "__main__":
    main()
