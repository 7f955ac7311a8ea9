"""The command line of `dtt train`, for all that starts it."""

from __future__ import annotations

from pathlib import Path

from dtt.config.flags import ConfigParser

DESCRIPTION = (
    "Train a model. The same command again continues the run of that name from its last checkpoint."
)
EXAMPLES = (
    "dtt train",
    "dtt train --data-path book.txt --max-steps 500",
    "dtt train -c run.yaml --model.layers 6 --lr 1e-3 -n deeper",
    "torchrun --nproc_per_node 8 -m dtt train -c run.yaml",
)


def train_parser() -> ConfigParser:
    """Return the parser of `dtt train`: the configuration, --resume and --fresh."""
    parser = ConfigParser("dtt train", DESCRIPTION, EXAMPLES)
    add_train_options(parser)
    return parser


def add_train_options(parser: ConfigParser) -> None:
    """Add what is no part of the configuration: --resume and --fresh."""
    parser.add_argument(
        "--resume", type=Path, metavar="PATH", help="start from another run's folder or checkpoint"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="discard the old run of that name, and start over"
    )
