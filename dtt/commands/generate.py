"""`dtt generate`."""

from __future__ import annotations

from pathlib import Path

from dtt.commands.run_options import add_run_options
from dtt.config.parser import CommandParser, at_least
from dtt.errors import ConfigError, DataError

DESCRIPTION = "Let the model of a run continue one or more prompts."
EXAMPLES = (
    'dtt generate runs/book --prompt "Once upon a time"',
    'dtt generate runs/book --prompt "He" --prompt "She" --num-samples 3 --temperature 0.7',
    "dtt generate runs/book --prompt-file prompts.txt --output texts.txt --seed 0",
    "dtt generate runs/book --interactive",
)
LARGEST_SEED = 2**63 - 1


def run(argv: list[str]) -> int:
    """Parse, collect the prompts, and generate."""
    parser = _parser()
    options = parser.parse(argv)
    if options.top_p is not None and options.top_p == 0:
        raise ConfigError("--top-p: should be more than 0, got 0")
    if options.interactive and (options.prompt or options.prompt_file or options.output):
        raise ConfigError("--interactive: asks for prompts and shows texts", "leave out the others")
    prompts = [*options.prompt]
    if options.prompt_file is not None:
        prompts.append(_read_prompt(options.prompt_file))
    if not prompts and not options.interactive:
        raise ConfigError("no prompt", "give --prompt TEXT, --prompt-file FILE or --interactive")

    from dtt.generation import generate_command

    return generate_command(
        run=options.run,
        prompts=prompts,
        max_length=options.max_length,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        num_samples=options.num_samples,
        output=options.output,
        interactive=options.interactive,
        checkpoint=options.checkpoint,
        device=options.device,
        precision=options.precision,
    )


def _parser() -> CommandParser:
    parser = CommandParser("dtt generate", "dtt generate [RUN] [options]", DESCRIPTION, EXAMPLES)
    add_run_options(parser)
    add = parser.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="beginning (repeatable)")
    add("--prompt-file", type=Path, metavar="FILE", help="one more prompt: the text of a file")
    add(
        "--max-length",
        "--max-new-tokens",
        type=at_least(1),
        default=200,
        metavar="N",
        help="new tokens (200)",
    )
    add(
        "--temperature",
        type=at_least(0, float),
        default=0.8,
        metavar="X",
        help="0: always the likeliest token (default: 0.8)",
    )
    add("--top-k", type=at_least(1), metavar="K", help="sample among the K likeliest tokens")
    add(
        "--top-p",
        type=at_least(0, float, 1),
        metavar="P",
        help="sample among the likeliest tokens that together have this probability",
    )
    add("--seed", type=at_least(0, int, LARGEST_SEED), metavar="N", help="same seed, same texts")
    add("--num-samples", type=at_least(1), default=1, metavar="N", help="texts per prompt (1)")
    add("--output", type=Path, metavar="FILE", help="write the texts to a file")
    add("--interactive", action="store_true", help="ask for prompts until an empty line")
    return parser


def _read_prompt(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        problem = (error.strerror or str(error)).lower()
        raise ConfigError(f"--prompt-file: {path}: {problem}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8", "convert the file") from None
