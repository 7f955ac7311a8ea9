"""Options of the commands that read a run: which one, which checkpoint, where to compute."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from dtt.config.parser import CommandParser


def add_run_option(parser: CommandParser) -> None:
    """Add RUN and --checkpoint."""
    parser.add_argument(
        "run", nargs="?", type=Path, metavar="RUN", help="run folder; default: the newest in runs/"
    )
    parser.add_argument(
        "--checkpoint",
        type=_checkpoint,
        default="best",
        metavar="best|last|N",
        help="which checkpoint, N: of that step (default: best)",
    )


def add_run_options(parser: CommandParser) -> None:
    """Add RUN, --checkpoint, --device and --precision."""
    add_run_option(parser)
    for name, choices, what in (
        ("--device", ("auto", "cpu", "cuda", "mps"), "where to compute"),
        ("--precision", ("auto", "fp32", "bf16", "fp16"), "arithmetic"),
    ):
        shown = "|".join(choices)
        parser.add_argument(name, choices=choices, default="auto", metavar=shown, help=what)


def _checkpoint(text: str) -> str:
    if not re.fullmatch(r"best|last|[0-9]+", text):
        raise argparse.ArgumentTypeError(f"should be best, last or a step, got {text!r}")
    return text
