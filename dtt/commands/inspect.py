"""`dtt data inspect`."""

from __future__ import annotations

from dtt.config.flags import ConfigParser
from dtt.config.load import to_yaml
from dtt.config.parser import at_least

DESCRIPTION = (
    "Try the cleaning steps of a configuration on a sample of its documents, and show what each "
    "would remove and change."
)
EXAMPLES = (
    "dtt data inspect -c run.yaml",
    "dtt data inspect -c run.yaml --step gopher --documents 10000",
    "dtt data inspect --data-path 'texts/*.txt' --data.cleaning unicode gopher exact-dedup",
)


def run(argv: list[str]) -> int:
    """Parse, validate, and try the steps."""
    parser = ConfigParser("dtt data inspect", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--documents",
        type=at_least(1),
        default=1000,
        metavar="N",
        help="documents to try them on (1000)",
    )
    parser.add_argument("--step", metavar="NAME", help="more examples, of this step only")
    options = parser.parse(argv)
    config = parser.config(options)
    if options.print_config:
        print(to_yaml(config), end="")
        return 0

    from dtt.data.inspection.inspect import inspect_command

    return inspect_command(config, documents=options.documents, step=options.step)
