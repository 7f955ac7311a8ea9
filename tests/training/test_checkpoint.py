"""Saving checkpoints under faults: what is found afterwards is whole, and the one it should be."""

from __future__ import annotations

import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toy_run import (
    activate,
    assert_whole,
    checkpoints_in,
    child,
    names,
    store,
    tensors,
)
from toy_run import (
    quick as quick,
)

from dtt.errors import CheckpointError, StorageError
from dtt.training.saved import open_checkpoint
from dtt.training.snapshot import digest, digest_of, untie, write_tensors


@pytest.mark.parametrize("background", [False, True])
def test_round_trip(tmp_path: Path, background: bool) -> None:
    made = checkpoints_in(tmp_path, background=background)
    assert made.newest() is None
    made.reserve(tensors(400))
    store(made, 400, best_loss=1.25)
    made.finish()
    assert_whole(made.newest(), 400)
    for which in ("best", "last", "400", "step-00000400"):
        assert_whole(open_checkpoint(tmp_path, which), 400)
    assert_whole(open_checkpoint(tmp_path / "checkpoints" / "step-00000400"), 400)
    loaded = open_checkpoint(tmp_path).tensors("model")
    assert loaded["embed.weight"] is loaded["head.weight"]
    assert names(tmp_path) == {"step-00000400", "last", "best"}
    assert (tmp_path / "checkpoints" / "last").read_text() == "step-00000400\n"
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-00000400 1.25\n"
    assert not made.warnings


def test_file_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    torch.manual_seed(0)
    group = {
        "fp32": torch.randn(3, 5),
        "strided": torch.randn(4, 6)[:, ::2].t(),
        "fp64": torch.randn(2, dtype=torch.float64),
        "bf16": torch.randn(7).bfloat16(),
        "fp16": torch.randn(7).half(),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "int32": torch.arange(3, dtype=torch.int32),
        "int16": torch.arange(3, dtype=torch.int16),
        "int8": torch.arange(3, dtype=torch.int8),
        "uint8": torch.arange(3, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "Ünï 名": torch.ones(1, requires_grad=True),
    }
    written, rows = write_tensors(tmp_path / "f", untie(group))
    loaded = load_file(tmp_path / "f")
    assert loaded.keys() == group.keys() and digest_of([rows]) == digest(group) == digest(loaded)
    for name, tensor in group.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        bits = (tensor.detach().contiguous().reshape(-1), loaded[name].reshape(-1))
        assert torch.equal(bits[0].view(torch.uint8), bits[1].view(torch.uint8))
    assert written.size == (tmp_path / "f").stat().st_size


def test_digest_sees_every_bit_name_type_and_shape() -> None:
    base = torch.randn(4, 4)
    marks = [digest({"w": base}), digest({"v": base}), digest({"w": base.reshape(2, 8)})]
    for element in range(16):
        for bit in range(32):
            damaged = base.clone().view(torch.int32)
            damaged.view(-1)[element] ^= -(2**31) if bit == 31 else 1 << bit
            marks.append(digest({"w": damaged.view(torch.float32)}))
    marks.append(digest({"w": base.view(torch.int32)}))
    assert marks[0] == digest({"w": base.clone()})
    assert marks.count(marks[0]) == 1
    sharded = sum(int(part.view(torch.int32).to(torch.int64).sum()) for part in base.split(3))
    assert sharded == int(base.view(torch.int32).to(torch.int64).sum())


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.empty(2, device="meta")])
def test_what_safetensors_cannot_hold_is_refused(tmp_path: Path, tensor: Tensor) -> None:
    with pytest.raises(CheckpointError, match="tensor w cannot be saved"):
        checkpoints_in(tmp_path).save(1, {"model": {"w": tensor}}, {}, {})


def test_background_save_does_not_alias_the_live_state(tmp_path: Path) -> None:
    made = checkpoints_in(tmp_path, background=True, keep=9)
    live = {"w": torch.zeros(1000), "n": torch.zeros(())}
    state, marks = {"list": [0]}, {}
    activate("storage.open@file=model.safetensors:sleep=0.05")
    for step in (1, 2, 3):
        live["w"] += 1
        live["n"] -= 1
        state["list"][0] = step
        marks[step] = digest(live)
        made.save(step, {"model": live}, state, {})
        live["w"] += 100  # training goes on while the writer has not begun
        state["list"][0] = -1
    made.finish()
    for step, mark in marks.items():
        found = open_checkpoint(tmp_path, str(step))
        assert digest(found.tensors("model")) == mark and found.state == {"list": [step]}
    assert len(set(marks.values())) == 3


@pytest.mark.processes
def test_killed_at_every_failpoint_of_a_save(tmp_path: Path) -> None:
    """Step 8 replaces an older step 8, so that the swap and retention are passed as well."""
    run, start = tmp_path / "run", tmp_path / "start"
    before = checkpoints_in(start, keep=3)
    for step in (2, 4, 8):
        store(before, step, best_loss=9.0 - step, tag="old")
    tags = []
    for hit in range(1, 200):
        shutil.copytree(start, run)

        def work(hit: int = hit) -> None:
            activate(f"*@hit={hit}:kill9")
            made = checkpoints_in(run, background=True)
            store(made, 8, best_loss=0.5, tag="new")
            made.finish()

        status = child(work)
        assert status in (0, signal.SIGKILL)
        made = checkpoints_in(run)
        found = made.newest()
        assert_whole(found, 8)
        tags.append(found.state["tag"])
        store(made, 10)  # the next start cleans up and goes on
        assert_whole(made.newest(), 10)
        assert_whole(open_checkpoint(run, "8"), 8)
        assert names(run) <= {"last", "best", "step-00000008", "step-00000010"}
        assert not made.warnings
        shutil.rmtree(run)
        if status == 0:
            break
    assert hit > 40 and tags == sorted(tags, reverse=True) and set(tags) == {"old", "new"}


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    made = checkpoints_in(tmp_path, keep=2)
    for step, loss in ((2, 3.0), (4, 1.5), (6, None), (8, None), (10, None)):
        store(made, step, best_loss=loss)
    kept = {"step-00000004", "step-00000008", "step-00000010", "last", "best"}
    assert names(tmp_path) == kept
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-00000004 1.5\n"
    assert_whole(open_checkpoint(tmp_path, "best"), 4)
    store(made, 12, best_loss=1.0)
    assert names(tmp_path) == {"step-00000010", "step-00000012", "last", "best"}


def test_retention_never_removes_the_last_whole_one(tmp_path: Path) -> None:
    store(checkpoints_in(tmp_path), 2)
    for step in (4, 6, 8):  # saved, then damaged, each by a process that then dies
        shutil.copytree(
            tmp_path / "checkpoints" / "step-00000002",
            tmp_path / "checkpoints" / f"step-{step:08d}",
        )
    made = checkpoints_in(tmp_path, keep=2)
    store(made, 10)
    assert "step-00000002" in names(tmp_path)
    store(made, 12)
    assert names(tmp_path) == {"step-00000010", "step-00000012", "last", "best"} - {"best"}


@pytest.mark.parametrize("hit", [1, 2, 5, 9])
def test_full_disk_leaves_the_earlier_ones_and_training_goes_on(tmp_path: Path, hit: int) -> None:
    made = checkpoints_in(tmp_path, background=True)
    store(made, 2)
    made.finish()
    activate(f"storage.write@hit={hit}:enospc")
    store(made, 4)
    made.poll()
    with pytest.raises(StorageError, match=r"step 4 was not saved.*No space left.*free some space"):
        made.finish()
    assert len(made.warnings) == 1 and "training goes on" in made.warnings[0]
    assert_whole(made.newest(), 2)
    assert names(tmp_path) == {"step-00000002", "last"}
    store(made, 6)
    made.finish()
    assert_whole(made.newest(), 6)


def test_file_size_limit_of_the_system(tmp_path: Path) -> None:
    store(checkpoints_in(tmp_path), 2)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        made = checkpoints_in(tmp_path)
        made.save(4, {"model": {"w": torch.zeros(9000)}}, {}, {})
        assert "File too large" in made.warnings[0] and "ulimit" in made.warnings[0]

    assert child(work) == 0
    assert names(tmp_path) == {"step-00000002", "last"}
    assert_whole(checkpoints_in(tmp_path).newest(), 2)


@pytest.mark.parametrize("background", [False, True])
def test_three_failures_in_a_row_end_the_run(tmp_path: Path, background: bool) -> None:
    made = checkpoints_in(tmp_path, background=background)
    activate("checkpoint.commit:enospc")
    with pytest.raises(StorageError, match="3 saves failed in a row") as caught:
        for step in range(1, 5):
            store(made, step)
    assert caught.value.exit_code == 5 and len(made.warnings) == 2
    assert made.newest() is None


@pytest.mark.parametrize("error", ["EIO", "EACCES", "ESTALE"])
@pytest.mark.parametrize("where", ["storage.write", "storage.fsync", "storage.rename"])
def test_passing_error_is_tried_again_with_one_warning(
    tmp_path: Path, error: str, where: str
) -> None:
    made = checkpoints_in(tmp_path)
    activate(f"{where}@hit=1:raise={error};{where}@hit=2:raise={error}")
    store(made, 4)
    made.finish()
    assert_whole(made.newest(), 4)
    assert len(made.warnings) == 1 and "tried again" in made.warnings[0]
    assert names(tmp_path) == {"step-00000004", "last"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("how", ["SystemExit", "KeyError"])
def test_writer_that_dies_is_reported_at_the_next_step(tmp_path: Path, how: str) -> None:
    made = checkpoints_in(tmp_path, background=True)
    activate(f"checkpoint.manifest@step=4:raise={how}")
    store(made, 4)
    for _ in range(500):
        made.poll()
        if made.warnings:
            break
        time.sleep(0.01)
    assert "step 4 was not saved" in made.warnings[0]
    store(made, 6)
    made.finish()
    assert_whole(made.newest(), 6)


def test_silently_shortened_file_is_not_committed(tmp_path: Path) -> None:
    made = checkpoints_in(tmp_path)
    activate("storage.fsync@file=model.safetensors,hit=1:truncate=10")
    store(made, 4)
    made.finish()
    assert_whole(made.newest(), 4)
    assert len(made.warnings) == 1
