"""`dtt evaluate`."""

from __future__ import annotations

from dtt.commands.run_options import add_run_options
from dtt.config.parser import CommandParser, at_least

DESCRIPTION = (
    "Measure loss, perplexity and bits per byte of a run over a whole split of its corpus."
)
EXAMPLES = (
    "dtt evaluate runs/book",
    "dtt evaluate runs/book --checkpoint last --split train --max-tokens 100000",
    "dtt evaluate runs/book --json",
)


def run(argv: list[str]) -> int:
    """Parse, and measure."""
    parser = CommandParser("dtt evaluate", "dtt evaluate [RUN] [options]", DESCRIPTION, EXAMPLES)
    add_run_options(parser)
    parser.add_argument("--split", choices=("val", "train"), default="val")
    parser.add_argument(
        "--stride",
        type=at_least(1),
        metavar="N",
        help="new tokens per window; the smaller, the more context each has (default: all)",
    )
    parser.add_argument("--batch-size", type=at_least(1), metavar="N", help="sequences per forward")
    parser.add_argument("--max-tokens", type=at_least(1), metavar="N", help="stop after so many")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of text")
    options = parser.parse(argv)

    from dtt.evaluation import evaluate_command

    return evaluate_command(
        run=options.run,
        checkpoint=options.checkpoint,
        split=options.split,
        stride=options.stride,
        batch_size=options.batch_size,
        max_tokens=options.max_tokens,
        device=options.device,
        precision=options.precision,
        json=options.json,
    )
