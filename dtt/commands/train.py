"""`dtt train`."""

from __future__ import annotations

from pathlib import Path

from dtt.config.flags import ConfigParser
from dtt.config.load import to_yaml

DESCRIPTION = (
    "Train a model. The same command again continues the run of that name from its last checkpoint."
)
EXAMPLES = (
    "dtt train",
    "dtt train --data-path book.txt --max-steps 500",
    "dtt train -c run.yaml --model.layers 6 --lr 1e-3 -n deeper",
    "torchrun --nproc_per_node 8 -m dtt train -c run.yaml",
)


def run(argv: list[str]) -> int:
    """Parse, validate, and hand the configuration to the launcher."""
    parser = ConfigParser("dtt train", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--resume", type=Path, metavar="PATH", help="start from another run's folder or checkpoint"
    )
    parser.add_argument("--fresh", action="store_true", help="the old run of that name may go")
    options = parser.parse(argv)
    config = parser.config(options)
    if config.init_from is not None:
        from dtt.huggingface.origin import with_origin

        config = with_origin(config, options.fresh)
    if options.print_config:
        print(to_yaml(config), end="")
        return 0

    from dtt.training.launch import launch_training

    return launch_training(config, resume=options.resume, fresh=options.fresh)
