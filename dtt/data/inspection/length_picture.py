"""A picture of how long documents are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from dtt import storage
from dtt.data.inspection.statistics import Lengths, histogram
from dtt.errors import ConfigError

COLOURS = {"train": "#9db8d2", "val": "#c0504d"}


def draw_lengths(corpora: Mapping[str, Mapping[str, Lengths]], path: Path) -> None:
    """Draw the lengths of documents by corpus and split; ConfigError where matplotlib is missing,
    or does not know the kind of file that the name asks for."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError(
            "a picture needs matplotlib, which is missing", "pip install 'dtt[plot]'"
        ) from None
    figure = Figure(figsize=(8, 3.6 * len(corpora)), dpi=120)
    rows = figure.subplots(len(corpora), squeeze=False)[:, 0]
    for axes, (name, splits) in zip(rows, corpora.items(), strict=True):
        for split, lengths in splits.items():
            edges, shares = _density(lengths)
            axes.stairs(shares, edges, fill=split == "train", color=COLOURS[split], label=split)
        if splits["train"].spread > 10:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set(xlabel="tokens a document", ylabel="share of documents per doubling")
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.tight_layout()
    try:
        with storage.storage_errors(path):
            figure.savefig(path)
    except ValueError as error:  # of matplotlib, for a suffix that it does not know
        raise ConfigError(f"{path}: {error}", "end the name with .png, .svg or .pdf") from None


def _density(lengths: Lengths) -> tuple[list[int], list[float]]:
    """Edges, and shares of documents between them over the logarithm of their ratio: bins of whole
    numbers differ in width, and counts alone would show that."""
    bins = histogram(lengths, 30)
    shares = [count / lengths.documents / math.log2((high + 1) / low) for low, high, count in bins]
    return [low for low, _, _ in bins] + [bins[-1][1] + 1], shares
