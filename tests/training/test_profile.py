"""Traces of a few steps, and what a run says that lacks memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import flags, small_config

from dtt.cli import main
from dtt.dist import Place, Runtime
from dtt.errors import OutOfMemoryError
from dtt.training import loop
from dtt.training.memory import memory_explained, remedies
from dtt.training.profile import StepProfiler
from dtt.training.step import Stepper

CPU = Runtime(Place(), torch.device("cpu"))
FEW = {"training.max_steps": "4", "evaluation.every": "0", "checkpoint.every": "0"}


def test_a_profile_of_chosen_steps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = flags(FEW | {"logging.profile": "true", "logging.profile_steps": "2-3"})
    assert main(["train", *words]) == 0
    out = capsys.readouterr().out
    assert "what costs most, by itself, of " in out and "aten::" in out
    assert "trace of steps 2-3: runs/small/profile/trace.json" in out
    trace = json.loads(Path("runs/small/profile/trace.json").read_text("utf-8"))
    steps = {e["name"] for e in trace["traceEvents"] if e["name"].startswith("ProfilerStep")}
    assert len(steps) == 2


def test_a_run_too_short_for_its_profile_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *flags(FEW | {"logging.profile": "true"})]) == 0
    assert "no trace: the run ended before steps 6-8" in capsys.readouterr().out


def test_a_run_that_ends_within_its_profile_says_what_was_recorded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step has as many calls as in a profile that the run is long enough for."""
    calls = {}
    for asked in ("3-8", "3-4"):
        words = {"name": asked, "logging.profile": "true", "logging.profile_steps": asked}
        assert main(["train", *flags(FEW | words)]) == 0
        out = capsys.readouterr().out
        assert f"trace of steps 3-4: runs/{asked}/profile/trace.json" in out
        table = [line.split() for line in out.splitlines() if line.startswith("aten::")]
        calls[asked] = {cells[0]: int(cells[-1]) for cells in table}
        trace = json.loads(Path(f"runs/{asked}/profile/trace.json").read_text("utf-8"))
        steps = {e["name"] for e in trace["traceEvents"] if e["name"].startswith("ProfilerStep")}
        assert len(steps) == 2
    both = calls["3-8"].keys() & calls["3-4"].keys()
    assert len(both) > 3 and all(calls["3-8"][name] == calls["3-4"][name] for name in both)


def test_a_profile_that_is_cut_short_counts_what_was_done(tmp_path: Path) -> None:
    """Four steps of one addition each, and a signal."""
    said: list[str] = []
    profiler = StepProfiler(tmp_path, "2-9", 100, said.append, cuda=False)
    for _ in range(4):
        torch.ones(3).add(1)
        profiler.step()
    profiler.close()
    (row,) = [line.split() for line in said[0].splitlines() if line.startswith("aten::add ")]
    assert row[-1] == "1"
    assert said[1].startswith("trace of steps 2-4: ") and len(said) == 2


def test_a_profile_that_is_cut_short_before_it_began(tmp_path: Path) -> None:
    said: list[str] = []
    profiler = StepProfiler(tmp_path, "2", 100, said.append, cuda=False)
    profiler.step()
    profiler.close()
    assert said == ["no trace: the run ended before steps 2 of this process"]


@pytest.mark.parametrize("asked", ["0", "8-6", "a", "1-"])
def test_steps_that_are_none(folder: Path, asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *flags({"logging.profile_steps": asked})]) == 2
    assert "profile_steps" in capsys.readouterr().err


def test_without_memory_the_line_says_what_to_lower(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def greedy(self: Stepper, *arguments: Any) -> Any:
        return torch.empty(1 << 58)  # what the allocator itself says to that

    monkeypatch.setattr(Stepper, "step", greedy)
    assert main(["train", *flags()]) == 70
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "out of memory on cpu: " in err
    assert "set training.micro_batch_size 4 (it is 8; the batch stays 8, in more forwards)" in err
    assert "or set training.gradient_checkpointing true" in err


def test_what_lowers_memory() -> None:
    three = {"training.batch_size": "9", "training.accumulation": "3"}
    first = remedies(small_config(three), CPU, "training")[0]
    assert first.startswith("set training.micro_batch_size 1 and training.accumulation null (it")
    least = {"training.micro_batch_size": "1", "training.gradient_checkpointing": "true"}
    assert remedies(small_config(least), CPU, "training") == [
        "set model.context 16 (it is 32), or take a smaller model"
    ]
    two = Runtime(Place(0, 2, 0, 2, "test"), torch.device("cpu"))
    found = remedies(small_config(), two, "training")
    assert any("parallel.shard -1" in line for line in found)


def test_what_lowers_memory_beside_the_steps() -> None:
    two = Runtime(Place(0, 2, 0, 2, "test"), torch.device("cpu"))
    building = remedies(small_config(), two, "building")
    assert building[0].startswith("set parallel.shard -1") and "smaller model" in building[1]
    assert remedies(small_config(), CPU, "building") == building[1:]  # it has no steps yet
    wide = small_config({"evaluation.batch_size": "64"})
    assert remedies(wide, CPU, "evaluating") == ["set evaluation.batch_size 32 (it is 64)"]
    as_in_steps = remedies(small_config(), CPU, "evaluating")
    assert as_in_steps == ["set evaluation.batch_size 4 (it is 8)"]
    assert remedies(small_config(), CPU, "sampling")[0].startswith("set sample.max_length 60 (it")


def test_a_validation_without_memory_names_its_own_setting(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "evaluate", lambda *given, **options: torch.empty(1 << 58))
    assert main(["train", *flags(FEW)]) == 70
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "out of memory on cpu while evaluating: " in err
    assert err.endswith("; set evaluation.batch_size 4 (it is 8)\n")


def test_only_a_lack_of_memory_is_explained(tmp_path: Path) -> None:
    given = small_config(), CPU, tmp_path
    with pytest.raises(ValueError, match="other"), memory_explained(*given, "training"):
        raise ValueError("other")
    with pytest.raises(OutOfMemoryError), memory_explained(*given, "training"):
        raise MemoryError
