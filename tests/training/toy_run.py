"""A small run to save and to read back, for the tests of checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtt import storage
from dtt.training import checkpoint, saved
from dtt.training.checkpoint import Checkpoints

FILES = {"config.yaml": b"model: {}\n", "tokenizer/merges.txt": b"a b\n"}
CONTENT = ["model.safetensors", "optimizer.safetensors", "state.json", *FILES, "manifest.json"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(checkpoint, "PAUSES", (0.0, 0.0))
    # A killed process does not lose what it wrote: syncing is test_power_loss's subject.
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    yield
    monkeypatch.undo()
    storage.active_failpoints.cache_clear()


def activate(text: str) -> None:
    os.environ.update(DTT_FAILPOINTS=text, DTT_ENABLE_FAILPOINTS="1")
    storage.active_failpoints.cache_clear()
    try:
        storage.active_failpoints()
    finally:
        del os.environ["DTT_FAILPOINTS"], os.environ["DTT_ENABLE_FAILPOINTS"]


def tensors(step: int) -> dict[str, dict[str, Tensor]]:
    weight = torch.arange(12, dtype=torch.float32).reshape(3, 4) + step
    return {
        "model": {
            "embed.weight": weight,
            "head.weight": weight,
            "norm": torch.full((5,), step / 3),
        },
        "optimizer": {"0.momentum": -weight.bfloat16(), "0.step": torch.tensor(step)},
    }


def store(
    checkpoints: Checkpoints, step: int, best_loss: float | None = None, tag: str = ""
) -> None:
    state = {"step": step, "loss": 0.1 + 0.2, "tag": tag}
    checkpoints.save(step, tensors(step), state, FILES, best_loss=best_loss)


def checkpoints_in(run: Path, keep: int = 2, background: bool = False) -> Any:
    warnings: list[str] = []
    made = Checkpoints(run / "checkpoints", keep=keep, background=background, warn=warnings.append)
    made.warnings = warnings  # type: ignore[attr-defined]
    return made


def assert_whole(found: saved.Saved, step: int) -> None:
    """`found` holds exactly what `store` gave for `step`."""
    assert (found.step, found.state["step"], found.state["loss"]) == (step, step, 0.1 + 0.2)
    assert found.files == FILES
    for group, expected in tensors(step).items():
        loaded = found.tensors(group)
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; return its wait status (0: it came to the end)."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]
