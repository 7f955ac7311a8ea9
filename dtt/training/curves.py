"""Curves of runs: a figure of metrics.jsonl against steps, tokens or seconds, for several runs."""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from dtt.errors import CheckpointError, ConfigError
from dtt.metrics.loggers import read_metrics

AXES = {"step": "optimizer step", "tokens": "tokens", "seconds": "seconds"}
UNITS = {
    "loss": "loss (nats per token)",
    "val_loss": "validation loss (nats per token)",
    "val_bits_per_byte": "validation (bits per byte)",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "mfu": "model FLOPs utilisation",
}
NO_CURVES = {"step", "tokens", "samples", "interval_seconds", "seconds_left"}
COLOURS = ("#1f4e79", "#c0504d", "#4f8a4f", "#8064a2", "#d08a2f", "#3a9fa5", "#7f7f7f", "#b04a8f")
FROM_ZERO = {"mfu", "tokens_per_second"}
SMOOTHED = {"loss", "grad_norm"}
"""Figures of single steps, drawn smoothed and, behind that, as they are."""


@dataclass(frozen=True)
class Curve:
    """One figure of one run."""

    name: str
    """Of the run."""
    x: list[float]
    y: list[float]


def read_curve(folder: Path, metric: str, axis: str) -> Curve:
    """Return a run's figure along an axis; ConfigError with what there is if it has none."""
    rows = read_run(folder)
    found = [row for row in rows if isinstance(row.get(metric), int | float)]
    if metric in NO_CURVES or not found:
        raise ConfigError(f"{folder} has no metric {metric!r}{_hint(metric, rows)}")
    place = _places(rows, axis)
    if place is None:
        raise ConfigError(f"{folder} does not say its {axis}", "use --x step")
    return Curve(folder.name, [place(row["step"]) for row in found], [row[metric] for row in found])


def read_run(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics; CheckpointError if it has none."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no run: it has no metrics.jsonl", "give a run's folder")
    rows = read_metrics(path)
    if not rows:
        raise CheckpointError(f"{path} is empty", "train for at least one step first")
    return rows


def metrics_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of all figures that can be drawn, those of each step first."""
    names = dict.fromkeys(
        name for row in rows for name, v in row.items() if isinstance(v, int | float)
    )
    return [name for name in names if name not in NO_CURVES]


def _hint(metric: str, rows: Sequence[dict[str, Any]]) -> str:
    names = metrics_of(rows)
    near = difflib.get_close_matches(metric, names, 1, 0.6)
    shown = [name for name in names if "/" not in name]
    families = dict.fromkeys(f"{name.split('/')[0]}/..." for name in names if "/" in name)
    listed = ", ".join([*shown, *families])
    return f"{f', did you mean {near[0]}?' if near else ';'} it has {listed}"


def _places(rows: Sequence[dict[str, Any]], axis: str) -> Callable[[int], float] | None:
    """Return what tells where on an axis a step is, between known steps on a straight line."""
    if axis == "step":
        return float
    if axis == "tokens":
        known = [(row["step"], float(row["tokens"])) for row in rows if "tokens" in row]
    else:
        timed = [row for row in rows if "interval_seconds" in row]
        ends = accumulate(row["interval_seconds"] for row in timed)
        known = [(row["step"], end) for row, end in zip(timed, ends, strict=True)]
    if not known:
        return None
    steps, values = [0, *(step for step, _ in known)], [0.0, *(value for _, value in known)]

    def place(step: int) -> float:
        index = min(max(bisect_left(steps, step), 1), len(steps) - 1)
        (a, b), (u, v) = steps[index - 1 : index + 1], values[index - 1 : index + 1]
        return v if b == a else u + (v - u) * (min(step, b) - a) / (b - a)

    return place


def smooth(values: Sequence[float]) -> list[float]:
    """Return an exponential average over about a hundredth of the run, without its start-up
    bias."""
    keep = 1 - 1 / max(2.0, len(values) / 100)
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(average / weight)
    return out


def draw_curves(curves: Sequence[Curve], metric: str, axis: str, path: Path, *, log: bool) -> None:
    """Draw the curves of one figure into one PNG, SVG or PDF file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter

    figure = Figure(figsize=(8, 4.5), dpi=120)
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        colour, y = COLOURS[number % len(COLOURS)], curve.y
        many = metric in SMOOTHED and len(y) > 50
        if many:
            axes.plot(curve.x, y, color=colour, linewidth=0.6, alpha=0.25)
            y = smooth(y)
        marker = "o" if metric not in SMOOTHED and len(y) <= 50 else None
        axes.plot(curve.x, y, color=colour, linewidth=1.6, label=curve.name, marker=marker,
                  markersize=3)  # fmt: skip
    axes.set(xlabel=AXES[axis], ylabel=UNITS.get(metric, metric))
    if not log:
        if metric in FROM_ZERO:
            axes.set_ylim(bottom=0)
        if metric == "mfu":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        elif metric == "tokens_per_second":
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    dress(axes, log=log)
    figure.savefig(path)


def dress(axes: Any, *, log: bool) -> None:
    """Give axes the grid, legend and layout of all pictures here, and with `log` its scale."""
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.figure.tight_layout()


def plot_command(
    *, runs: Sequence[Path], metric: str, axis: str, output: Path | None, log: bool
) -> int:
    """Draw a figure of runs, and say where; return the exit code."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError("matplotlib is missing", "pip install 'dtt[plot]'") from error
    curves = _distinct([read_curve(run, metric, axis) for run in runs], runs)
    path = output or Path(f"{metric.replace('/', '-')}.png")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"-o {path}: should end in .png, .svg or .pdf")
    if log and any(value <= 0 for curve in curves for value in curve.y):
        raise ConfigError(f"--log: {metric} is not above zero everywhere", "leave --log out")
    draw_curves(curves, metric, axis, path, log=log)
    for curve in curves:
        last = curve.y[-1]
        print(f"{curve.name}: {len(curve.y)} points, last {last:.4g}, lowest {min(curve.y):.4g}")
    print(path)
    return 0


def _distinct(curves: list[Curve], runs: Sequence[Path]) -> list[Curve]:
    """Name runs of one name by their paths."""
    names = [curve.name for curve in curves]
    return [
        curve if names.count(curve.name) == 1 else Curve(str(run), curve.x, curve.y)
        for curve, run in zip(curves, runs, strict=True)
    ]
