"""A picture of the loss, from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from dtt.metrics.loggers import read_metrics
from dtt.training.curves import AXES, UNITS, dress, smooth

BARS = "▁▂▃▄▅▆▇█"


def draw_loss(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Write loss.png into a run folder and return its path; None where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        warn("no picture of the loss: matplotlib is missing; pip install 'dtt[plot]'")
        return None
    rows = read_metrics(folder / "metrics.jsonl")
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    measured = [row for row in rows if "val_loss" in row]
    val = [(row["step"], row["val_loss"]) for row in measured]
    steps, losses = [step for step, _ in train], [loss for _, loss in train]
    figure = Figure(figsize=(8, 4.5), dpi=120)  # no pyplot: a notebook's backend is left alone
    axes = figure.subplots()
    axes.plot(steps, losses, color="#9db8d2", linewidth=0.8, label="training, each step")
    axes.plot(steps, smooth(losses), color="#1f4e79", linewidth=1.6, label="training, smoothed")
    if val:
        axes.plot(*zip(*val, strict=True), "o-", color="#c0504d", markersize=4, label="validation")
    if measured and measured[-1]["val_floor"]:
        row = measured[-1]
        floor = row["val_loss"] * row["val_floor"] / row["val_bits_per_byte"]
        axes.axhline(floor, color="#4f8a4f", linestyle="--", linewidth=1, label="best possible")
    axes.set(xlabel=AXES["step"], ylabel=UNITS["loss"], title=folder.name)
    dress(axes, log=bool(losses) and min(losses) > 0 and max(losses) / min(losses) > 4)
    path = folder / "loss.png"
    figure.savefig(path)
    return path


def sparkline(folder: Path, width: int = 60) -> str:
    """Return the training loss as one line of text: the mean of each `width`th of the run."""
    losses = [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    width = min(width, len(losses))
    edges = [len(losses) * i // width for i in range(width + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    bars = "".join(BARS[round((mean - low) * scale)] for mean in means)
    return f"loss {means[0]:.2f} {bars} {means[-1]:.2f}"
