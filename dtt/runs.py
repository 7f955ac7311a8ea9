"""Run folders, and the checkpoints in them by name; nothing is opened, and no torch is loaded."""

from __future__ import annotations

import re
from pathlib import Path

from dtt.errors import CheckpointError
from dtt.storage import storage_errors

MANIFEST = "manifest.json"
STEP = re.compile(r"step-(\d{8,})(\.old)?")
"""A committed checkpoint; `.old` is one that is being replaced by another of the same step."""
PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}


def scan(folder: Path) -> list[Path]:
    """Return the committed checkpoints in a `checkpoints` folder, newest step first, unverified."""
    if not folder.is_dir():
        return []
    with storage_errors(folder, "read"):
        names = {path.name: path for path in folder.iterdir() if not path.is_symlink()}
    found = [(match, names[name]) for name in names if (match := STEP.fullmatch(name))]
    # Of two with the same step, the one that replaces the other comes first.
    found.sort(key=lambda item: (-int(item[0][1]), item[0][2] is not None))
    return [path for _, path in found if path.is_dir()]


def newest_step(run: Path) -> int:
    """Return the step of the newest committed checkpoint of a run, 0 if there is none."""
    steps = (STEP.fullmatch(path.name) for path in scan(run / "checkpoints"))
    return next((int(step[1]) for step in steps if step), 0)


def find_run(path: Path | None, *, planned: bool = False) -> Path:
    """Return the run folder that `path` is or is inside of; None: the newest run in ./runs.

    With `planned` the folder of a job that waits is a run, too: all it has is logs/. Raises
    CheckpointError, which says what is there instead.
    """
    if path is None:
        found = [child for child in _children(Path("runs")) if _is_run(child, planned)]
        if not found:
            raise CheckpointError("there is no run in ./runs", "name a run folder, or train one")
        return max(found, key=_touched)
    if path.is_file():
        raise _not_a_folder(path)
    if not path.exists():
        elsewhere = Path("runs") / path
        hint = f"did you mean {elsewhere}?" if _is_run(elsewhere) else _runs_in(path.parent)
        raise CheckpointError(f"{path} does not exist", hint)
    for folder in (path, *path.absolute().parents[:2]):
        if _is_run(folder, planned):
            return folder
    raise CheckpointError(f"{path} is not a run (no config.yaml, no checkpoints)", _runs_in(path))


def _is_run(folder: Path, planned: bool = False) -> bool:
    if is_checkpoint(folder):  # it has a config.yaml of its own
        return False
    if planned and (folder / "logs").is_dir():
        return True
    return (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir()


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, by its name or by what is in it."""
    named = STEP.fullmatch(folder.name) is not None and folder.is_dir()
    return named or (folder / MANIFEST).is_file()  # a copy may have any name


def _children(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    with storage_errors(folder, "read"):
        return sorted(path for path in folder.iterdir() if path.is_dir())


def _touched(run: Path) -> float:
    names = ("config.yaml", "checkpoints", "metrics.jsonl", "logs/attempts.jsonl")
    parts = (run, *(run / name for name in names))
    return max(path.stat().st_mtime for path in parts if path.exists())


def _runs_in(folder: Path) -> str:
    runs = [str(path) for path in _children(folder) if _is_run(path)]
    return f"runs there: {', '.join(runs[:8])}" if runs else "name the folder that training wrote"


def _not_a_folder(path: Path) -> CheckpointError:
    with storage_errors(path, "read"), path.open("rb") as file:
        start = file.read(2)
    if path.suffix in PICKLES or start in (
        b"PK",
        b"\x80\x02",
        b"\x80\x03",
        b"\x80\x04",
        b"\x80\x05",
    ):
        what = f"{path} is a pickle, which can run code when it is opened; dtt never opens one"
        return CheckpointError(what, "name the folder of a run")
    return CheckpointError(f"{path} is a file, not a run folder", "name the folder of a run")
