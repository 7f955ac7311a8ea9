"""The command line: finds the command, runs it, and turns what goes wrong into one line.

Nothing heavy is imported before a command is chosen, so that `dtt --help` is there at once.
"""

from __future__ import annotations

import os
import sys

from dtt.errors import EXIT_INTERRUPTED, ConfigError
from dtt.reporting import report_error
from dtt.version import __version__

# name: (summary, module with `run(argv) -> exit code`)
COMMANDS = {
    "download": ("Bring a corpus to this disk.", "dtt.commands.download"),
    "tokenize": ("Turn a corpus into token shards.", "dtt.commands.tokenize"),
    "data": ("Look at data: inspect, show, stats, audit.", "dtt.commands.data"),
    "tokenizer": ("Compare tokenizers on a text.", "dtt.commands.tokenizer"),
    "train": ("Train a model, or continue its run.", "dtt.commands.train"),
    "launch": ("Start training on a cluster, and look after it.", "dtt.commands.launch"),
    "evaluate": ("Measure a run's loss on a whole split.", "dtt.commands.evaluate"),
    "generate": ("Let a run's model write.", "dtt.commands.generate"),
    "plot": ("Draw figures of runs.", "dtt.commands.plot"),
    "export": ("Write a run's model for transformers, proven.", "dtt.commands.export"),
    "doctor": ("Examine this machine, or all of a launch.", "dtt.commands.doctor"),
    "verify": ("Prove that layouts of ranks train alike.", "dtt.commands.verify"),
    "config": ("Show presets, the JSON schema, the documentation.", "dtt.commands.config"),
}
EXAMPLES = (
    "dtt train                                    the embedded default: tales, about a minute",
    "dtt train --data-path book.txt --max-steps 500",
    "dtt evaluate runs/book",
    'dtt generate runs/book --prompt "Once upon a time"',
)
EXIT_BROKEN_PIPE = 141


def main(argv: list[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit code, never a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    words = [word for word in argv if word != "--debug"]
    command = words[0] if words and words[0] in COMMANDS else ""
    prog = f"dtt {command}".rstrip()
    if (
        not debug
    ):  # torch's C++ writes stack traces where dtt writes one line; set before its import
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        code = _run(command, words, debug)
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:
        # The reader has gone (`| head`); Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        return report_error(prog, error)


def _run(command: str, words: list[str], debug: bool) -> int:
    if command:
        from importlib import import_module

        module = import_module(COMMANDS[command][1])
        return int(module.run([*(["--debug"] if debug else []), *words[1:]]))
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
    elif words[0] in ("-V", "--version"):
        print(f"dtt {__version__}")
    else:
        import difflib

        near = difflib.get_close_matches(words[0], COMMANDS, 1)
        kind = "option" if words[0].startswith("-") else "command"
        hint = f", did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown {kind} {words[0]!r}{hint}", "" if near else "see dtt --help")
    return 0


def _help() -> str:
    commands = "\n".join(f"  {name:<10} {summary}" for name, (summary, _) in COMMANDS.items())
    examples = "\n".join(f"  {example}" for example in EXAMPLES)
    return (
        "usage: dtt COMMAND [options]\n\n"
        "From raw text to a language model of your own.\n\n"
        f"commands:\n{commands}\n\n"
        "`dtt COMMAND --help` shows a command's options; `dtt --version` the version.\n\n"
        f"examples:\n{examples}"
    )
