"""`dtt train`."""

from __future__ import annotations

from dtt.config.load import to_yaml
from dtt.launch.arguments import train_parser


def run(argv: list[str]) -> int:
    """Parse, validate, and hand the configuration to the launcher."""
    parser = train_parser()
    options = parser.parse(argv)
    config = parser.config(options)
    if config.is_described_elsewhere:
        from dtt.huggingface.origin import with_origin

        config = with_origin(config, options.fresh)
    if options.print_config:
        print(to_yaml(config), end="")
        return 0

    from dtt.launch.training import launch_training

    return launch_training(config, resume=options.resume, fresh=options.fresh)
