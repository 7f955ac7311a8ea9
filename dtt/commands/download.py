"""`dtt download`."""

from __future__ import annotations

from pathlib import Path

from dtt.config.flags import ConfigParser
from dtt.config.load import to_yaml

DESCRIPTION = "Write a corpus to a text file."
EXAMPLES = (
    "dtt download -d tales -o tales.txt",
    "dtt download -d tales --data.source.stories 1000 -o small.txt",
    "dtt download -d stdlib -o stdlib.txt",
)


def run(argv: list[str]) -> int:
    """Parse, validate, and write the corpus."""
    parser = ConfigParser("dtt download", DESCRIPTION, EXAMPLES)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: DIR/SOURCE.txt")
    options = parser.parse(argv)
    config = parser.config(options)
    if options.print_config:
        print(to_yaml(config), end="")
        return 0

    from dtt.data.download import download_command

    return download_command(config, output=options.output)
