"""`dtt tokenizer`."""

from __future__ import annotations

from dtt.config.parser import CommandParser, at_least

DESCRIPTION = """Look at tokenizers.

  compare  bytes per token, speed, exactness and vocabulary of several on one text

A tokenizer is a tokenizer.json, a prepared corpus, a run, an encoding of tiktoken that is in its
cache (gpt2, cl100k_base, ...), char or byte."""
EXAMPLES = (
    "dtt tokenizer compare data/book-bpe-1f2e3d4c5b6a gpt2 byte --on book.txt",
    "dtt tokenizer compare runs/book char --on book-char --split train",
    "dtt tokenizer compare tokenizer.json gpt2 --on book.txt --json",
)


def run(argv: list[str]) -> int:
    """Parse, and compare."""
    parser = CommandParser(
        "dtt tokenizer",
        "dtt tokenizer compare A [B ...] --on CORPUS|FILE [options]",
        DESCRIPTION,
        EXAMPLES,
    )
    parser.add_argument("what", choices=("compare",), metavar="compare")
    parser.add_argument("names", nargs="+", metavar="A [B ...]", help="tokenizers")
    parser.add_argument(
        "--on", required=True, metavar="CORPUS|FILE", help="prepared corpus, run, or text file"
    )
    parser.add_argument(
        "--split", choices=("train", "val"), default="val", help="of a corpus (default: val)"
    )
    parser.add_argument("--source", metavar="NAME", help="which corpus of a run's mixture")
    parser.add_argument(
        "--max-bytes",
        type=at_least(1),
        default=10_000_000,
        metavar="N",
        help="read at most so many, evenly spread (default: 10 million)",
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON for each tokenizer")
    options = parser.parse(argv)

    from dtt.data.inspection.tokenizer_comparison import compare_command

    return compare_command(
        names=options.names,
        on=options.on,
        split=options.split,
        source=options.source,
        max_bytes=options.max_bytes,
        json_line=options.json,
    )
