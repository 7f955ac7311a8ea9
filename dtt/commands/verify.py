"""`dtt verify`."""

from __future__ import annotations

from dtt.config.flags import ConfigParser

DESCRIPTION = """Prove that every layout of ranks trains the model that one process trains.

  parallel  your model, made small, on processes of this machine's CPU: one, and each layout;
            losses, gradient norms and every gradient are compared"""
EXAMPLES = (
    "dtt verify parallel",
    "dtt verify parallel -c run.yaml",
    "dtt verify parallel -c qwen3-0.6b --optimizer adamw",
)


def run(argv: list[str]) -> int:
    """Parse, and verify."""
    parser = ConfigParser("dtt verify", DESCRIPTION, EXAMPLES)
    parser.add_argument("what", choices=("parallel",), metavar="parallel")
    options = parser.parse(argv)
    config = parser.config(options)

    from dtt.huggingface.origin import with_origin
    from dtt.verification.report import verify_command

    return verify_command(with_origin(config))
