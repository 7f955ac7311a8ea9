"""`dtt download`."""

from __future__ import annotations

from pathlib import Path

from dtt.config.flags import ConfigParser
from dtt.config.load import to_yaml

DESCRIPTION = (
    "Bring a corpus to this disk: a data set of the Hugging Face Hub, or files at URLs. "
    "The same command again goes on where it was stopped, and does nothing when all is here. "
    "Other corpora are written to a text file."
)
EXAMPLES = (
    "dtt download -d roneneldan/TinyStories --dry-run",
    "dtt download -d configs/project_datasets/fineweb-edu.yaml --max-documents 10000",
    "dtt download -d wikimedia/wikipedia --data.source.config 20231101.en --max-bytes 2G",
    "dtt download -d tales -o tales.txt",
)


def run(argv: list[str]) -> int:
    """Parse, validate, and bring the corpus."""
    parser = ConfigParser("dtt download", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write the documents as one text file"
    )
    for flag, text in (
        ("--dry-run", "say what would be downloaded, and stop"),
        ("--update", "ask the Hub whether the revision has moved"),
        ("--verify", "read every file again, and bring those that are damaged"),
    ):
        parser.add_argument(flag, action="store_true", help=text)
    options = parser.parse(argv)
    config = parser.config(options)
    if options.print_config:
        print(to_yaml(config), end="")
        return 0

    from dtt.data.remote.download import download_command

    return download_command(
        config,
        output=options.output,
        dry_run=options.dry_run,
        update=options.update,
        verify=options.verify,
    )
