"""The text of Slurm batch scripts: pure functions of what is to run.

One `srun` starts the ranks, without torchrun between: signals reach them, and their exit codes come
back. The batch shell only passes signals on, and asks `slurm_attempt` what is to happen next.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

PATIENCE = 600
"""Seconds that ranks have to end when the first one has: rank 0 may have a checkpoint to finish."""

Header = Mapping[str, str | int | None]
"""Options of sbatch by name, without hyphens; an empty text is a flag, None is left out."""


@dataclass(frozen=True)
class Words:
    """What a script calls things: literal words, or expressions of the shell in ready scripts."""

    python: str
    arguments: str
    """Of `dtt`'s command, quoted for an array of the shell."""
    run: str = ""
    """The folder of the run."""
    setup: tuple[str, ...] = ()
    """Lines before anything is started, such as `module load cuda`."""
    about: tuple[str, ...] = field(default=())
    """Comments below the first line."""


TRAIN = """\
messages="$run/logs/srun.err"
attempt() {
  "$python" -m dtt.launch.slurm_attempt "$1" --run "$run" --job "$SLURM_JOB_ID" \\
    --chain "$DTT_CHAIN" --nodes "$SLURM_JOB_NODELIST" --messages "$messages" "${@:2}"
}
asked=
trap 'asked=1' USR1 TERM  # by the signal before the wall time, or by a person
export DTT_CHAIN="${DTT_CHAIN:-$SLURM_JOB_ID}"  # the first job of those that go on with each other
mkdir -p "$run/logs"
attempt begin || exit
touch "$run/logs/rank-0.log"
# A rank that ends does not end the others, which may be saving; they have --wait seconds.
srun --kill-on-bad-exit=0 --wait=%(patience)d --open-mode=append \\
  --output="$run/logs/rank-%%t.log" bash -c 'trap "" USR1; exec "$@"' rank \\
  "$python" -m dtt train "${arguments[@]}" 2> >(tee "$messages" >&2) &
ranks=$!
tail --pid="$ranks" -s 0.5 -n 0 -F "$run/logs/rank-0.log" &  # rank 0 speaks here too
speaker=$!
# A signal ends `wait`, not the ranks: they are asked to save. Those that still load Python ignore
# it (see above), so they are asked until they have ended.
while kill -0 "$ranks" 2>/dev/null; do
  if [ -z "$asked" ]; then wait "$ranks"; continue; fi
  scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null
  for _ in 1 2 3 4 5; do kill -0 "$ranks" 2>/dev/null && sleep 1; done
done
wait "$ranks"; code=$?
wait "$speaker"
attempt end --code "$code" -- "$@"
"""
STAGE = """\
exec %(start)s"$python" -m dtt %(command)s "${arguments[@]}"
"""


def train_script(header: Header, words: Words) -> str:
    """Return the script of a training run that goes on until it is complete."""
    return _text(header, words, TRAIN % {"patience": PATIENCE})


def stage_script(header: Header, words: Words, command: str, *, shared: bool) -> str:
    """Return the script of `dtt download` or `dtt tokenize`; `shared`: one process on each task."""
    return _text(header, words, STAGE % {"command": command, "start": "srun " if shared else ""})


def quoted(words: Iterable[str]) -> str:
    """Return words for an array of the shell."""
    return " ".join(shlex.quote(word) for word in words)


def _text(header: Header, words: Words, body: str) -> str:
    lines = ["#!/bin/bash", *(f"# {line}".rstrip() for line in words.about)]
    for name, value in header.items():
        if value is not None:
            # Text that means nothing to sbatch stays as it is, or people could not edit it.
            lines.append(f"#SBATCH --{name}" + (f"={_value(str(value))}" if value != "" else ""))
    lines += ["", *words.setup, f"python={words.python}", f"arguments=({words.arguments})"]
    if words.run:
        lines.append(f"run={words.run}")
    cpus = header.get("cpus-per-task")
    if cpus is not None:  # since Slurm 22.05 srun does not take it from the job
        lines.append(f"export SRUN_CPUS_PER_TASK={cpus}")
    return "\n".join(lines) + "\n\n" + body


def _value(text: str) -> str:
    plain = all(c.isalnum() or c in "-_./:,=@%+[]*&|!" for c in text)
    return text if plain else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
