"""One thread per process: deterministic, and safe to fork (an OpenMP pool does not survive it).

And a text with an uninterrupted run of it, for the tests that start runs.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_bed

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as `dtt` has it
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A shell has its background jobs ignore Ctrl-C, and nohup hanging up; what they start would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with text.txt in it; failpoints set in it end with the test."""
    from small_run import write_text

    from dtt import storage

    write_text(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    yield tmp_path
    monkeypatch.undo()
    storage.active_failpoints.cache_clear()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run folder of the small run on so many ranks, done in one go."""
    from small_run import command, flags, write_text

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


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_bed.Cluster]:
    """A real Slurm of node1 and node2; skips, with the reason, where it cannot be started."""
    try:
        found = slurm_bed.start(tmp_path_factory.mktemp("slurm") / "bed")
    except slurm_bed.AbsentError as reason:
        pytest.skip(f"no Slurm here: {reason}")
    yield found
    slurm_bed.stop(found)


@pytest.fixture
def slurm(
    cluster: slurm_bed.Cluster, monkeypatch: pytest.MonkeyPatch
) -> Iterator[slurm_bed.Cluster]:
    """The cluster, for the commands of this process and those that it starts; free afterwards."""
    for name, value in cluster.environ.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.clear()
