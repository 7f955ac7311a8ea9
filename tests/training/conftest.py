"""A text, and an uninterrupted run of it to compare with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_run import command, flags, write_text

from dtt import storage


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with text.txt in it; failpoints set in it end with the test."""
    write_text(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    yield tmp_path
    monkeypatch.undo()
    storage.active_failpoints.cache_clear()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run folder of the small run on so many ranks, done in one go."""
    made: dict[int, Path] = {}

    def run(ranks: int) -> Path:
        if ranks not in made:
            base = tmp_path_factory.mktemp(f"ranks-{ranks}")
            write_text(base / "text.txt")
            done = command(base, ["train", *flags({"parallel.world_size": str(ranks)})])
            assert (done.code, done.err) == (0, "")
            made[ranks] = base / "runs" / "small"
        return made[ranks]

    return run


@pytest.fixture
def finished(folder: Path, uninterrupted: Callable[[int], Path]) -> Path:
    """A copy of a finished run in the working folder, with its prepared data."""
    done = uninterrupted(1)
    shutil.copytree(done, folder / "runs" / "small")
    shutil.copytree(done.parents[1] / "data", folder / "data")
    return folder / "runs" / "small"
