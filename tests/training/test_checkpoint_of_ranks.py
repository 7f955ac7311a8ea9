"""A checkpoint that several ranks write is whole or not there, whichever of them fails, and how."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from small_run import (
    Done,
    assert_same_run,
    command,
    final_tensors,
    flags,
    losses,
    write_text,
)
from toy_run import activate

from dtt import storage
from dtt.errors import StorageError
from dtt.training import ranks
from dtt.training.checkpoint import Checkpoints
from dtt.training.ranks import collect, contribute
from dtt.training.saved import open_checkpoint
from dtt.training.snapshot import Group

RUN = Path("runs/small")
TENSOR = {
    "parallel.world_size": "2",
    "parallel.tensor": "2",
    "parallel.restarts": "0",
    "training.max_steps": "16",
    "evaluation.every": "0",
    "checkpoint.keep": "9",
}
THEIRS = "file=optimizer-00002-of-00002.safetensors"
GROUPS = {name: Group({"w": torch.ones(3)}, {}) for name in ("model", "optimizer")}


@pytest.fixture(autouse=True)
def no_failpoints_after() -> Iterator[None]:
    yield
    storage.active_failpoints.cache_clear()


def train(folder: Path, failpoint: str = "", grace: float = 10.0) -> Done:
    environ = {"DTT_ENABLE_FAILPOINTS": "1", "DTT_FAILPOINTS": failpoint}
    words = ["train", *flags(TENSOR)]
    done = command(folder, words, environ=environ if failpoint else None, grace=grace)
    lines = done.err.splitlines(keepends=True)
    said = "".join(line for line in lines if "failpoints are active" not in line)
    return Done(done.code, done.out, said)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nothing stops."""
    base = tmp_path_factory.mktemp("whole")
    write_text(base / "text.txt")
    assert train(base).code == 0
    return base / RUN


def saved_steps() -> list[int]:
    return sorted(int(path.name[5:]) for path in (RUN / "checkpoints").glob("step-????????"))


@pytest.mark.processes
@pytest.mark.parametrize(
    ("failpoint", "dead"),
    [
        (f"storage.open@{THEIRS},hit=2:kill9", 1),
        (f"storage.write@{THEIRS},hit=20:kill9", 1),
        ("checkpoint.manifest@step=8:kill9", 0),
    ],
)
def test_a_rank_killed_while_saving_leaves_the_checkpoint_before(
    folder: Path, whole: Path, failpoint: str, dead: int
) -> None:
    done = train(folder, failpoint, grace=1.0)
    assert done.code == 7 and f"rank {dead} died by SIGKILL; the same command" in done.err
    assert saved_steps() == [4] and open_checkpoint(RUN, "last").step == 4
    assert list((RUN / "checkpoints").glob("step-00000008.*.tmp"))
    assert len(final_tensors(RUN)) > 20  # and they are those that were saved
    done = train(folder)
    assert (done.code, done.err) == (0, "") and "from step 4" in done.out
    assert not list((RUN / "checkpoints").glob("*.tmp")) and saved_steps() == [4, 8, 12, 16]
    assert_same_run(RUN, whole)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("failpoint", "why"),
    [
        (f"storage.open@{THEIRS},hit=2:enospc", "No space left on device"),
        (f"storage.fsync@{THEIRS},hit=2:raise=MemoryError", "MemoryError("),
        ("storage.open@file=optimizer-00001-of-00002.safetensors,hit=2:enospc", "No space left"),
    ],
)
def test_a_rank_that_cannot_write_is_a_warning(folder: Path, failpoint: str, why: str) -> None:
    done = train(folder, failpoint)
    assert done.code == 0 and done.err.count("\n") == 1, done.err
    assert done.err.startswith("dtt: warning: the checkpoint of step 8 was not saved: ")
    assert why in done.err and "training goes on, earlier checkpoints are intact" in done.err
    assert ("rank 1: " in done.err) == (THEIRS in failpoint)
    assert saved_steps() == [4, 12, 16] and not list((RUN / "checkpoints").glob("*.tmp"))
    assert all(open_checkpoint(RUN, str(step)).step == step for step in saved_steps())
    assert sorted(losses(RUN)) == list(range(1, 17))


@pytest.mark.processes
def test_a_rank_that_never_can_write_ends_the_run(folder: Path) -> None:
    hits = ";".join(f"storage.open@{THEIRS},hit={hit}:enospc" for hit in (2, 3, 4))
    done = train(folder, hits)
    *warnings, last = done.err.splitlines()
    assert done.code == 5 and len(warnings) == 2, done.err
    assert "3 saves failed in a row" in last and "rank 1: " in last and "free some space" in last
    assert saved_steps() == [4] and open_checkpoint(RUN, "last").step == 4


@pytest.mark.processes
def test_what_is_damaged_is_not_used_by_any_rank(folder: Path, whole: Path) -> None:
    """Rank 1 finds it while both load; what it cannot even read keeps it from nothing."""
    shutil.copytree(whole, RUN)
    newest = RUN / "checkpoints" / "step-00000016"
    for name, at in (("model-00002-of-00002.safetensors", -5), (THEIRS[5:], 0)):
        data = bytearray((newest / name).read_bytes())
        at = at or data.index(b"exp_avg_sq")  # the name of a tensor in the header
        data[at] ^= 1
        (newest / name).write_bytes(data)
    assert losses(RUN) == losses(whole)
    done = train(folder)
    assert done.code == 0 and done.err.count("\n") == 1, done.err
    assert done.err.startswith("dtt: warning: checkpoint") and "-00002-of-00002" in done.err
    assert "falling back to the checkpoint before it" in done.err and "from step 12" in done.out
    assert_same_run(RUN, whole)


@pytest.mark.parametrize(
    ("failpoint", "why", "fix"),
    [
        ("storage.write@file=optimizer-00002-of-00003.safetensors:enospc", "No space", "free some"),
        ("storage.open@file=model-00002-of-00003.safetensors:raise=EACCES", "denied", "permission"),
        ("storage.fsync@file=model-00002-of-00003.safetensors:raise=KeyError", "KeyError", "log"),
    ],
)
def test_whatever_keeps_a_rank_from_writing_is_reported(
    tmp_path: Path, failpoint: str, why: str, fix: str
) -> None:
    """And what it has written goes first: on a full disk there is no room for the report."""
    activate(failpoint)
    contribute(tmp_path, 1, 3, GROUPS)
    assert [path.name for path in tmp_path.iterdir()] == ["rank-1.json"]
    contribute(tmp_path, 2, 3, GROUPS)
    with pytest.raises(StorageError, match=rf"rank 1: .*{why}.*{fix}"):
        collect(tmp_path, 3)


def test_a_folder_that_cannot_be_made_is_a_save_that_failed(tmp_path: Path) -> None:
    warnings: list[str] = []
    made = Checkpoints(
        tmp_path / "checkpoints", keep=2, background=True, warn=warnings.append, ranks=2
    )
    activate(";".join(f"storage.mkdir@hit={hit}:enospc" for hit in (1, 2, 4, 5, 6)))
    assert made.begin(4) is None and made.begin(8) is None
    assert len(warnings) == 2 and "step 8 was not saved" in warnings[1]
    with pytest.raises(StorageError, match="3 saves failed in a row"):
        for step in (12, 16, 20):
            made.begin(step)


def test_what_ranks_have_written_is_collected_once(tmp_path: Path) -> None:
    for rank in (2, 1):
        contribute(tmp_path, rank, 3, GROUPS)
    reports = collect(tmp_path, 3)
    for rank, report in enumerate(reports, 2):
        for group, (name, written, _) in report.files.items():
            assert name == f"{group}-{rank:05d}-of-00003.safetensors"
            assert written.size == (tmp_path / name).stat().st_size
            assert written.digest == storage.file_digest(tmp_path / name, blake3)
    assert len(reports) == 2 and not list(tmp_path.glob("*.json"))


def test_a_rank_that_says_nothing_is_not_waited_for_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "PATIENCE", 0.05)
    contribute(tmp_path, 1, 3, GROUPS)
    with pytest.raises(StorageError, match=r"rank 2 has not written its part.*share"):
        collect(tmp_path, 3)
