"""`dtt tokenize`."""

from __future__ import annotations

from dtt.config.flags import ConfigParser
from dtt.config.load import to_yaml

DESCRIPTION = "Turn a corpus into token shards, once; training with the same settings finds them."
EXAMPLES = (
    "dtt tokenize -d stdlib --tokenizer bpe -v 8192",
    "dtt tokenize --data-path book.txt --force",
    "mpirun -n 4 dtt tokenize -c run.yaml",
    "dtt tokenize -c run.yaml --dask tcp://scheduler:8786",
)


def run(argv: list[str]) -> int:
    """Parse, validate, and prepare the corpus."""
    parser = ConfigParser("dtt tokenize", DESCRIPTION, EXAMPLES)
    parser.add_argument("--force", action="store_true", help="write shards that are there again")
    parser.add_argument(
        "--dask",
        metavar="ADDRESS|local",
        help="encode on the workers of a Dask scheduler, or of one that is started here",
    )
    options = parser.parse(argv)
    config = parser.config(options)
    if config.is_described_elsewhere:
        from dtt.huggingface.origin import with_origin

        config = with_origin(config)
    if options.print_config:
        print(to_yaml(config), end="")
        return 0

    from dtt.data.preparation.tokenizing import prepare_command

    return prepare_command(config, force=options.force, dask=options.dask)
