"""The batch scripts in sbatch/: what `dtt launch slurm` writes, for people who begin with sbatch.

`python -m dtt.launch.slurm_ready sbatch` writes them anew; a test proves that they are current.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dtt.errors import EXIT_DONE
from dtt.launch.slurm import UNKNOWN
from dtt.launch.slurm_script import Header, Words, stage_script, train_script

PYTHON = '"${PYTHON:-python}"'
ARGUMENTS = '-c "${CONFIG:-configs/config.yaml}" "$@"'
FOLDER = '$("$python" -m dtt.launch.slurm_attempt folder "${arguments[@]}") || exit'
SETUP = (
    "# Before anything starts: module load ..., source .venv/bin/activate, export HF_HOME=...",
)
GOES_ON = (
    "It saves before the wall time, goes back into the queue, and goes on until the run is",
    "complete. Ranks write to RUN/logs/rank-K.log; `dtt launch status RUN` says how far it is.",
)


def ready_scripts() -> dict[str, str]:
    """Return the scripts by file name."""
    return {
        "download.sh": _stage("download", "Bring a corpus to the shared disk", 1, False),
        "tokenize.sh": _stage("tokenize", "Turn a corpus into token shards, on all nodes", 2, True),
        "train.sh": _train("dtt-train", 2, 1, None),
        "train_8gpu.sh": _train("dtt-train-8gpu", 1, 8, 8),
    }


def _train(name: str, nodes: int, ranks: int, gpus: int | None) -> str:
    more = "one node with eight GPUs" if gpus else "several nodes"
    options = "--nodes=4" if gpus else "--nodes=4 --ntasks-per-node=8 --gpus-per-node=8"
    file = "sbatch/train_8gpu.sh" if gpus else "sbatch/train.sh"
    about = (
        f"Train on {more}:",
        f"  CONFIG=my.yaml sbatch {file} --max-steps 5000",
        f"  sbatch {options} {file}",
        *GOES_ON,
    )
    header: Header = {
        "job-name": name,
        "nodes": nodes,
        "ntasks-per-node": ranks,
        "gpus-per-node": gpus,
        "requeue": "",
        "open-mode": "append",
        "signal": f"B:USR1@{UNKNOWN}",
        "output": "%x-%j.log",
    }
    return train_script(header, Words(PYTHON, ARGUMENTS, FOLDER, SETUP, about))


def _stage(name: str, what: str, nodes: int, shared: bool) -> str:
    about: tuple[str, ...] = (f"{what}:", f"  CONFIG=my.yaml sbatch sbatch/{name}.sh")
    if shared:
        array = "sbatch --array=1-50 --nodes=1 sbatch/tokenize.sh"
        about += (f"  {array}    # or by tasks that share it",)
    header: Header = {
        "job-name": f"dtt-{name}",
        "nodes": nodes,
        "ntasks-per-node": 1,
        "open-mode": "append",
        "output": "%x-%j.log",
    }
    words = Words(PYTHON, ARGUMENTS, setup=SETUP, about=about)
    return stage_script(header, words, name, shared=shared)


def main(argv: list[str]) -> int:
    """Write the scripts into the folder named."""
    for name, text in ready_scripts().items():
        (Path(argv[0]) / name).write_text(text, encoding="utf-8")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
