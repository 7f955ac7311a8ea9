"""`dtt export`."""

from __future__ import annotations

from pathlib import Path

from dtt.commands.run_options import add_run_option
from dtt.config.parser import CommandParser

DESCRIPTION = (
    "Write the model of a run as a folder for others: in an architecture of transformers, or as "
    "safetensors with dtt's own names. The folder is there only when its logits and tokens have "
    "been compared."
)
EXAMPLES = (
    "dtt export runs/book",
    "dtt export runs/book --checkpoint last --dtype bf16 -o book-model",
    "dtt export runs/book --push my-name/book",
    "dtt export runs/book --to safetensors",
)


def run(argv: list[str]) -> int:
    """Parse, and export."""
    parser = CommandParser("dtt export", "dtt export [RUN] [options]", DESCRIPTION, EXAMPLES)
    add_run_option(parser)
    add = parser.add_argument
    add(
        "--to",
        choices=("hf", "safetensors"),
        default="hf",
        metavar="hf|safetensors",
        help="for transformers, or with dtt's own names (default: hf)",
    )
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to (default: exports/NAME-hf)",
    )
    add(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        metavar="fp32|bf16|fp16",
        help="type of the weights (default: fp32, as they were trained)",
    )
    add("--push", metavar="ORG/NAME", help="also upload the folder to the Hub (HF_ENDPOINT)")
    add("--force", action="store_true", help="an exported model that is there may go")
    add(
        "--no-verify",
        action="store_true",
        help="do not compare with transformers, which needs not be installed then",
    )
    options = parser.parse(argv)

    from dtt.huggingface.export import export_command

    return export_command(
        run=options.run,
        to=options.to,
        output=options.output,
        checkpoint=options.checkpoint,
        dtype=options.dtype,
        push=options.push,
        force=options.force,
        verify=not options.no_verify,
    )
