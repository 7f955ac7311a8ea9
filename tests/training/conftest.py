"""A finished run to look at and to go on from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def finished(folder: Path, uninterrupted: Callable[[int], Path]) -> Path:
    """A copy of a finished run in the working folder, with its prepared data."""
    done = uninterrupted(1)
    shutil.copytree(done, folder / "runs" / "small")
    shutil.copytree(done.parents[1] / "data", folder / "data")
    return folder / "runs" / "small"
