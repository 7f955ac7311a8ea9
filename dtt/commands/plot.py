"""`dtt plot`."""

from __future__ import annotations

from pathlib import Path

from dtt.config.parser import CommandParser

DESCRIPTION = "Draw a figure of one run or several, from their metrics.jsonl."
EXAMPLES = (
    "dtt plot runs/small runs/large",
    "dtt plot runs/* --metric val_loss --x tokens -o compare.png",
    "dtt plot runs/book --metric grad_norm --log",
)


def run(argv: list[str]) -> int:
    """Parse, and draw."""
    parser = CommandParser("dtt plot", "dtt plot RUN... [options]", DESCRIPTION, EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--metric",
        default="loss",
        metavar="NAME",
        help="loss, val_loss, lr, grad_norm, tokens_per_second, mfu, ... (default: loss)",
    )
    parser.add_argument(
        "--x",
        choices=("step", "tokens", "seconds"),
        default="step",
        metavar="step|tokens|seconds",
        help="what to draw it against (default: step)",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help=".png, .svg or .pdf (default: NAME.png)"
    )
    parser.add_argument("--log", action="store_true", help="logarithmic y axis")
    options = parser.parse(argv)

    from dtt.training.curves import plot_command

    return plot_command(
        runs=options.runs,
        metric=options.metric,
        axis=options.x,
        output=options.output,
        log=options.log,
    )
