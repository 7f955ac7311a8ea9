"""`dtt data show`, `dtt data stats` and `dtt data audit`."""

from __future__ import annotations

from pathlib import Path

from dtt.config.parser import CommandParser, at_least
from dtt.errors import ConfigError

CORPUS = "prepared folder, run folder, or a name below data/ (its beginning is enough)"


def show(argv: list[str]) -> int:
    """Parse, and show text."""
    parser = CommandParser(
        "dtt data show",
        "dtt data show CORPUS [--document N | --window N | --search TEXT] [options]",
        "Show the text of a prepared corpus, as training reads it.",
        (
            "dtt data show data/book-char-1f2e3d4c5b6a",
            "dtt data show book-char --document 3 --tokens",
            "dtt data show runs/book --window 12 --split val",
            'dtt data show runs/book --search "Once upon a time"',
        ),
    )
    parser.add_argument("corpus", metavar="CORPUS", help=CORPUS)
    parser.add_argument("--document", type=at_least(0), metavar="N", help="a whole document")
    parser.add_argument(
        "--window", type=at_least(0), metavar="N", help="a window, as training cuts it"
    )
    parser.add_argument("--search", metavar="TEXT", help="where this text occurs")
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--source", metavar="NAME", help="which corpus of a run's mixture")
    parser.add_argument(
        "--context", type=at_least(1), metavar="T", help="tokens in a window (default: the run's)"
    )
    parser.add_argument("--tokens", action="store_true", help="show where each token ends")
    parser.add_argument(
        "--limit", type=at_least(1), default=10, metavar="N", help="lines to show (default: 10)"
    )
    options = parser.parse(argv)
    asked = [name for name in ("document", "window", "search") if vars(options)[name] is not None]
    if len(asked) > 1:
        raise ConfigError(f"--{asked[0]} and --{asked[1]} are both given", "give one of them")
    if options.tokens and asked not in (["document"], ["window"]):
        raise ConfigError("--tokens needs --document N or --window N")

    from dtt.data.inspection.look import show_command

    return show_command(
        name=options.corpus,
        split=options.split,
        source=options.source,
        document=options.document,
        window=options.window,
        search=options.search,
        context=options.context,
        tokens=options.tokens,
        limit=options.limit,
    )


def stats(argv: list[str]) -> int:
    """Parse, and measure."""
    parser = CommandParser(
        "dtt data stats",
        "dtt data stats CORPUS [options]",
        "Measure a prepared corpus: lengths of documents, duplicates, use of the vocabulary.",
        (
            "dtt data stats book-char",
            "dtt data stats runs/book -o lengths.png",
            "dtt data stats data/web-bpe-1f2e3d4c5b6a --json",
        ),
    )
    parser.add_argument("corpus", metavar="CORPUS", help=CORPUS)
    parser.add_argument("--source", metavar="NAME", help="only one corpus of a run's mixture")
    parser.add_argument(
        "--max-tokens",
        type=at_least(1),
        metavar="N",
        help="read at most about so many of a split (default: 500 million; lengths need none)",
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON for each corpus")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="draw the lengths (.png, .svg, .pdf)"
    )
    options = parser.parse(argv)

    from dtt.data.inspection.figures import stats_command

    return stats_command(
        name=options.corpus,
        source=options.source,
        max_tokens=options.max_tokens,
        json_line=options.json,
        output=options.output,
    )


def audit(argv: list[str]) -> int:
    """Parse, and prove."""
    parser = CommandParser(
        "dtt data audit",
        "dtt data audit RUN [--step N] [options]",
        "Prove which samples each step of a run saw: each once per epoch, whatever happened to it.",
        (
            "dtt data audit runs/book",
            "dtt data audit runs/book --step 100",
            "dtt data audit runs/book -o ledger.jsonl",
        ),
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--step", type=at_least(1), metavar="N", help="show what one step sees")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of text")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write the samples of every step"
    )
    options = parser.parse(argv)

    from dtt.data.inspection.audit_report import audit_command

    return audit_command(
        name=options.run, step=options.step, json_line=options.json, output=options.output
    )
