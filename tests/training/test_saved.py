"""Reading checkpoints: whatever was done to them, only whole ones are used, and nothing runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from toy_run import (
    CONTENT,
    assert_whole,
    checkpoints_in,
    names,
    store,
)
from toy_run import (
    quick as quick,
)

from dtt import storage
from dtt.errors import CheckpointError
from dtt.runs import find_run
from dtt.training import saved
from dtt.training.saved import open_checkpoint


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize(
    "harm", ["flip", "empty", "half", "short", "longer", "gone", "link", "fifo"]
)
def test_damage_to_any_file(tmp_path: Path, name: str, harm: str) -> None:
    made = checkpoints_in(tmp_path)
    store(made, 4)
    store(made, 8)
    file = tmp_path / "checkpoints" / "step-00000008" / name
    data = file.read_bytes()
    file.unlink()
    middle = len(data) // 2
    if harm == "flip":
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif harm == "link":
        (tmp_path / "outside").write_bytes(data)
        file.symlink_to(tmp_path / "outside")
    elif harm == "fifo":
        os.mkfifo(file)
    elif harm != "gone":
        lengths = {"empty": 0, "half": middle, "short": len(data) - 1, "longer": len(data) + 1}
        file.write_bytes((data + b" ")[: lengths[harm]])
    assert_whole(made.newest(), 4)
    assert len(made.warnings) == 1 and name in made.warnings[0]
    for which in ("last", "8"):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path, which)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert_whole(open_checkpoint(tmp_path, "4"), 4)
    store(made, 12)  # retention does not count the damaged one
    assert_whole(open_checkpoint(tmp_path, "4"), 4)


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    store(checkpoints_in(tmp_path), 8)
    file = tmp_path / "checkpoints" / "step-00000008" / "manifest.json"
    data = file.read_bytes()
    tolerated = 0
    for position in range(0, len(data), 5):
        file.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        try:
            assert_whole(open_checkpoint(tmp_path, "8"), 8)
            tolerated += 1
        except CheckpointError:
            pass
    assert tolerated == 0


def test_no_whole_checkpoint_left_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    made = checkpoints_in(tmp_path)
    store(made, 4)
    (tmp_path / "checkpoints" / "step-00000004" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        made.newest()


@pytest.mark.parametrize("pointer", ["empty", "garbage", "dangling", "loop", "outside", "folder"])
def test_pointers_and_strange_names_cannot_mislead(tmp_path: Path, pointer: str) -> None:
    made = checkpoints_in(tmp_path)
    store(made, 4, best_loss=1.0)
    store(made, 8)
    folder = tmp_path / "checkpoints"
    for name in ("last", "best"):
        path = folder / name
        path.unlink()
        if pointer == "loop":
            path.symlink_to(path)
        elif pointer == "folder":
            path.mkdir()
        else:
            text = {"empty": "", "garbage": "\xff\0", "dangling": "step-00000099\n"}
            path.write_text(text.get(pointer, "../../elsewhere\n"))
    for name in ("step-abc", "step-8", "other", ".trash-step-00000002.x", "step-00000099.1f.tmp"):
        (folder / name).mkdir()
    (folder / "step-00000098").symlink_to(folder / "step-00000098")
    (folder / "step-00000097").symlink_to("/")
    (folder / "step-00000096").write_text("a file")
    assert_whole(made.newest(), 8)
    assert_whole(open_checkpoint(tmp_path, "best"), 4)
    assert_whole(open_checkpoint(tmp_path, "last"), 8)
    assert not made.warnings
    store(made, 12)
    made.finish()
    assert_whole(made.newest(), 12)
    assert not {".trash-step-00000002.x", "step-00000099.1f.tmp"} & names(tmp_path)
    assert bool(made.warnings) == (pointer == "folder")


def test_a_copy_under_another_step_is_not_that_step(tmp_path: Path) -> None:
    made = checkpoints_in(tmp_path)
    store(made, 8)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000008", folder / "step-00000099")
    assert_whole(made.newest(), 8)
    assert "belongs to step 8" in made.warnings[0]
    shutil.copytree(folder / "step-00000008", tmp_path / "mine")
    assert_whole(open_checkpoint(tmp_path / "mine"), 8)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.ckpt", "x.bin", "x", "model.safetensors"])
def test_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    made = checkpoints_in(tmp_path / "run")
    store(made, 4)
    inside = tmp_path / "run" / "checkpoints" / "step-00000004"
    for path in (tmp_path / name, inside / name):
        path.write_bytes(pickle.dumps(Canary(canary)))
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        assert caught.value.exit_code == 4 and "pickle" in str(caught.value)
    if name == "model.safetensors":
        # As an attacker would: with sizes and hashes that agree.
        manifest = json.loads((inside / "manifest.json").read_text())
        size, digest = (inside / name).stat().st_size, storage.file_digest(inside / name, blake3)
        manifest["files"][name] = {"size": size, "blake3": digest}
        (inside / "manifest.json").write_bytes(saved.seal(manifest))
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            open_checkpoint(tmp_path / "run")
    assert not canary.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"format": 4, "dtt": "9.0"},
        {"files": None},
        {"files": {"../../outside": {"size": 1, "blake3": ""}}},
        {"files": {"/etc/passwd": {"size": 1, "blake3": ""}}},
        {"tensors": []},
        {"tensors": {"model": {}}},
        {"files": {"state.json": 3}},
    ],
)
def test_manifest_of_another_version_or_made_up(tmp_path: Path, change: dict[str, Any]) -> None:
    store(checkpoints_in(tmp_path), 4)
    file = tmp_path / "checkpoints" / "step-00000004" / "manifest.json"
    manifest = json.loads(file.read_text()) | change
    file.write_bytes(saved.seal(manifest))
    (tmp_path / "outside").write_text("x")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    if "format" in change:
        assert "version 4, written by dtt 9.0" in str(caught.value)
        assert "reads version 3" in str(caught.value)


def test_stays_readable_when_deleted(tmp_path: Path) -> None:
    store(checkpoints_in(tmp_path), 4)
    found = open_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    assert_whole(found, 4)


def test_loaded_tensors_can_be_changed_without_touching_the_file(tmp_path: Path) -> None:
    store(checkpoints_in(tmp_path), 4)
    found = open_checkpoint(tmp_path)
    found.tensors("model")["norm"].zero_()
    with pytest.raises(CheckpointError, match="values are not those"):
        found.tensors("model")
    assert_whole(open_checkpoint(tmp_path), 4)


def test_reading_while_a_run_saves_and_removes(tmp_path: Path) -> None:
    made = checkpoints_in(tmp_path, keep=1)
    store(made, 1, best_loss=1.0)
    over = threading.Event()

    def write() -> None:
        step = 1
        while not over.is_set():
            step += 1
            store(made, step, best_loss=1 / step if step % 3 == 0 else None)
            store(made, step)  # replaced at once

    writer = threading.Thread(target=write)
    writer.start()
    try:
        last = 0
        for _ in range(100):
            for which in ("best", "last"):
                found = open_checkpoint(tmp_path, which)
                assert_whole(found, found.step)
            assert found.step >= last
            last = found.step
    finally:
        over.set()
        writer.join()
    assert last > 1 and not made.warnings


def test_find_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no run in"):
        find_run(None)
    for when, name in enumerate(("b", "c", "a")):
        store(checkpoints_in(Path("runs") / name), 4)
        for path in (Path("runs") / name, *(Path("runs") / name).rglob("*")):
            os.utime(path, (when + 1, when + 1))
    assert find_run(None) == Path("runs/a")
    assert find_run(Path("runs/b")) == Path("runs/b")
    for inside in ("checkpoints", "checkpoints/step-00000004"):
        assert find_run(Path("runs/b") / inside).resolve() == tmp_path / "runs" / "b"
    with pytest.raises(CheckpointError, match=r"did you mean runs/c\?"):
        find_run(Path("c"))
    with pytest.raises(CheckpointError, match=r"runs there: runs/a, runs/b, runs/c"):
        find_run(Path("runs/nothing"))
    with pytest.raises(CheckpointError, match=r"not a run.*runs there: runs/a"):
        find_run(Path("runs"))
    (tmp_path / "runs" / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        open_checkpoint(Path("runs/empty"))
    with pytest.raises(CheckpointError, match="no checkpoint '7'; best, last or one of 4"):
        open_checkpoint(Path("runs/a"), "7")
