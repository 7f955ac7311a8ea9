"""The command line: finds the command, runs it, and turns what goes wrong into one line.

Nothing heavy is imported before a command is chosen, so that `dtt --help` is there at once.
"""

from __future__ import annotations

import errno
import os
import sys

from dtt.errors import EXIT_INTERNAL, ConfigError, DttError, OtherRankError, StorageError
from dtt.version import __version__

# name: (summary, module with `run(argv) -> exit code`)
COMMANDS = {
    "download": ("Write a corpus to a text file.", "dtt.commands.download"),
    "tokenize": ("Turn a corpus into token shards.", "dtt.commands.tokenize"),
    "train": ("Train a model, or continue its run.", "dtt.commands.train"),
    "evaluate": ("Measure a run's loss on a whole split.", "dtt.commands.evaluate"),
    "generate": ("Let a run's model write.", "dtt.commands.generate"),
    "config": ("Show presets, the JSON schema, the documentation.", "dtt.commands.config"),
}
EXAMPLES = (
    "dtt train                                    the embedded default: tales, about a minute",
    "dtt train --data-path book.txt --max-steps 500",
    "dtt evaluate runs/book",
    'dtt generate runs/book --prompt "Once upon a time"',
)
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
STORAGE_FIXES = {
    errno.ENOSPC: "free some space, or choose another folder with --checkpoint-dir",
    errno.EDQUOT: "free some of your quota, or choose another folder with --checkpoint-dir",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "check the path",
    errno.EROFS: "choose a place that can be written",
    errno.EIO: "check the disk, or choose another place",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit code, never a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    words = [word for word in argv if word != "--debug"]
    command = words[0] if words and words[0] in COMMANDS else ""
    prog = f"dtt {command}".rstrip()
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
        return _report(prog, error)


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


def _report(prog: str, error: Exception) -> int:
    """Print what went wrong, a line each, and return the exit code of it."""
    known = _explained(error)
    if isinstance(known, OtherRankError):
        return known.exit_code
    if known is not None:
        for line in str(known).splitlines():
            print(f"{prog}: error: {line}", file=sys.stderr)
        return known.exit_code
    text = " ".join(str(error).split())
    text = f"{text[:300]}..." if len(text) > 300 else text
    if _is_out_of_memory(error):
        fix = "lower --micro-batch-size, --model.context or the size of the model"
        print(f"{prog}: error: out of memory: {text or 'no details'}; {fix}", file=sys.stderr)
    else:
        fix = "run again with --debug for the traceback, and please report it"
        what = f"{type(error).__name__}: {text} ({_place(error)})"
        print(f"{prog}: internal error: {what}; {fix}", file=sys.stderr)
    return EXIT_INTERNAL


def _explained(error: Exception) -> DttError | None:
    """The error as one of dtt's, where it is one or says as much."""
    if isinstance(error, DttError):
        return error
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("dtt"):
        return ConfigError(f"the Python package {error.name!r} is missing", "pip install dtt again")
    if isinstance(error, OSError) and error.errno in STORAGE_FIXES:
        name = f"{error.filename}: " if error.filename is not None else ""
        problem = (error.strerror or str(error)).lower()
        return StorageError(f"{name}{problem}", STORAGE_FIXES[error.errno])
    return None


def _is_out_of_memory(error: Exception) -> bool:
    # By name: naming torch's class would import torch.
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "t allocate memory" in str(error)


def _place(error: Exception) -> str:
    """The innermost line of dtt on the way to an error, as train/loop.py:57."""
    place, trace = "", error.__traceback__
    folder = os.path.dirname(__file__) + os.sep
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file.startswith(folder) or not place:
            place = f"{file.removeprefix(folder)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
