"""One thread per process: deterministic, and safe to fork (an OpenMP pool does not survive it)."""

import os
from collections.abc import Iterator

import pytest
import slurm_bed

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


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
