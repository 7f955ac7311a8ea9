"""What a run says of itself: where its time goes, norms of its layers, traces, lack of memory."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import build_stepper as small_stepper
from small_run import command, flags, small_config, start, synthetic_batch, wait

from dtt.cli import main
from dtt.config.load import load_config
from dtt.dist import Place, Runtime
from dtt.errors import OutOfMemoryError
from dtt.machine import free_port
from dtt.metrics.loggers import read_metrics
from dtt.metrics.meter import Cost, Meter
from dtt.metrics.peak import Peak
from dtt.training import run as running
from dtt.training.memory import memory_explained, remedies
from dtt.training.norms import layer_norms, layers_of
from dtt.training.state import Run
from dtt.training.step import Stepper

CPU = Runtime(Place(), torch.device("cpu"))
FEW = {"training.max_steps": "4", "evaluation.every": "0", "checkpoint.every": "0"}


def rows(name: str = "small") -> list[dict[str, Any]]:
    return read_metrics(Path("runs") / name / "metrics.jsonl")


def parts(row: dict[str, Any]) -> dict[str, float]:
    return {n.removeprefix("time_"): v for n, v in row.items() if n.startswith("time_")}


# --- time ----------------------------------------------------------------------------------------


def test_parts_of_the_time_add_up_to_the_wall_clock(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, ended = [], []
    make, rest = Meter.__init__, Run.report_rest

    def made(self: Meter, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        begun.append(time.perf_counter())

    def reported(self: Run) -> None:
        rest(self)
        ended.append(time.perf_counter())

    monkeypatch.setattr(Meter, "__init__", made)
    monkeypatch.setattr(Run, "report_rest", reported)
    words = {"sample.prompts": "[the]", "sample.every": "12", "sample.max_length": "3"}
    assert main(["train", *flags(words | {"logging.every": "6"})]) == 0
    timed = [row for row in rows() if "interval_seconds" in row]
    assert [row["step"] for row in timed] == [1, 6, 12, 18, 24, 24]
    assert all(
        sum(parts(row).values()) == pytest.approx(row["interval_seconds"], rel=1e-9)
        for row in timed
    )
    total = sum(row["interval_seconds"] for row in timed)
    assert total == pytest.approx(ended[0] - begun[0], rel=0.02)
    sums = {name: sum(parts(row)[name] for row in timed) for name in parts(timed[0])}
    assert all(sums[name] > 0 for name in ("data", "compute", "optimizer", "saving", "logging"))
    assert all(sums[name] > 0 for name in ("evaluating", "sampling", "rest"))
    assert sums["rest"] < 0.05 * total + 0.02
    assert "exchange" not in sums
    assert "where the time went: forward and backward" in capsys.readouterr().out


def test_an_mfu_above_everything_is_said_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "find_peak", lambda device, dtype: Peak(1e3, "published"))
    assert main(["train", *flags(FEW | {"logging.every": "1"})]) == 0
    out, err = capsys.readouterr()
    assert err.count("the meter is wrong: an MFU of") == 1
    assert "against a published peak of 1 kFLOP/s" in err
    assert "MFU" not in "".join(line for line in out.splitlines() if line.startswith("step"))
    assert not any("mfu" in row for row in rows())


def test_mfu_is_the_tested_formula(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtt.metrics.flops import training_flops

    monkeypatch.setattr(running, "find_peak", lambda device, dtype: Peak(1e13, "published"))
    assert main(["train", *flags(FEW)]) == 0
    model = load_config(["runs/small/config.yaml"]).model  # with its vocabulary
    cost = Cost(training_flops(model).total, Peak(1e13, "published"), 1)
    measured = [row for row in rows() if "mfu" in row]
    assert measured
    for row in measured:
        assert row["mfu"] == pytest.approx(cost.mfu(row["tokens_per_second"]))


# --- norms ---------------------------------------------------------------------------------------


def test_norms_are_those_of_the_layers() -> None:
    stepper = small_stepper(small_config({"training.grad_clip": "null"}), CPU)
    result = stepper.step(synthetic_batch(0), 0)
    named = dict(stepper.model.named_parameters())
    layers = layers_of(named)
    gradients, weights = layer_norms(stepper.model, layers, CPU).tolist()
    assert "blocks.1.attention.qkv" in layers and "embed" in layers
    for layer, gradient, weight in zip(layers, gradients, weights, strict=True):
        own = [p for name, p in named.items() if name.rpartition(".")[0] == layer]
        flat = torch.cat([p.grad.flatten() for p in own])
        assert gradient == pytest.approx(float(flat.norm()), rel=1e-5)
        assert weight == pytest.approx(float(torch.cat([p.detach().flatten() for p in own]).norm()))
    total = math.sqrt(sum(g * g for g in gradients))
    assert total == pytest.approx(float(result.grad_norm), rel=1e-5)


def norms_of(name: str) -> dict[str, float]:
    (found,) = [row for row in rows(name) if any(k.startswith("weight_") for k in row)]
    return {key: value for key, value in found.items() if key.startswith("weight_")}


@pytest.mark.processes
def test_norms_are_the_same_in_every_layout(folder: Path) -> None:
    """Clipping in force: the figures are those before it."""
    asked = {"logging.norms_every": "2", "training.grad_clip": "0.01", "training.max_steps": "2"}
    asked |= {"evaluation.every": "0", "checkpoint.every": "0", "model.dropout": "0"}
    layouts: dict[str, dict[str, str]] = {
        "one": {},
        "ddp": {"parallel.world_size": "2"},
        "shard": {"parallel.world_size": "2", "parallel.shard": "2"},
        "tensor-pipeline": {
            "parallel.world_size": "4", "parallel.tensor": "2", "parallel.pipeline": "2",
        },
    }  # fmt: skip
    for name, layout in layouts.items():
        done = command(folder, ["train", *flags(asked | layout | {"name": name})])
        assert done.code == 0, done.err
    expected = norms_of("one")
    gradients = [v for k, v in expected.items() if k.startswith("weight_grad_norm/")]
    (whole,) = [row["grad_norm"] for row in rows("one") if row["step"] == 2 and "loss" in row]
    assert whole > 0.02  # clipped
    assert math.sqrt(sum(v * v for v in gradients)) == pytest.approx(whole, rel=1e-4)
    for name in layouts:
        assert norms_of(name) == pytest.approx(expected, rel=1e-3), name


# --- profile and memory --------------------------------------------------------------------------


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
    first = remedies(small_config(three), CPU)[0]
    assert first.startswith("set training.micro_batch_size 1 and training.accumulation null (it")
    least = {"training.micro_batch_size": "1", "training.gradient_checkpointing": "true"}
    assert remedies(small_config(least), CPU) == [
        "set model.context 16 (it is 32), or take a smaller model"
    ]
    two = Runtime(Place(0, 2, 0, 2, "test"), torch.device("cpu"))
    assert any("parallel.shard -1" in line for line in remedies(small_config(), two))


def test_only_a_lack_of_memory_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="other"), memory_explained(small_config(), CPU, tmp_path):
        raise ValueError("other")
    with pytest.raises(OutOfMemoryError), memory_explained(small_config(), CPU, tmp_path):
        raise MemoryError


# --- other ranks, other machines -----------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize("layout", ["ddp", "shard"])
def test_waits_for_a_slow_rank_are_seen(folder: Path, layout: str) -> None:
    """Rank 1 is 0.1 s late with each of 12 steps, for which rank 0 has to wait; DDP tells of a
    step's wait in the next one."""
    two = {"parallel.world_size": "2", "parallel.shard": "2" if layout == "shard" else "1"}
    words = flags(FEW | two | {"training.max_steps": "12"})
    done = command(folder, ["train", *words], lag=(1, 0.1))
    assert done.code == 0, done.err
    timed = [row for row in rows() if "interval_seconds" in row]
    waited = sum(row["time_exchange"] for row in timed)
    assert 0.6 < waited <= sum(row["interval_seconds"] for row in timed)
    assert "waiting for other ranks" in done.out


@pytest.mark.processes
def test_where_waits_cannot_be_seen_the_line_says_so(folder: Path) -> None:
    words = flags(FEW | {"parallel.world_size": "2", "parallel.tensor": "2"})
    done = command(folder, ["train", *words])
    assert done.code == 0, done.err
    assert "forward and backward (with waits for other ranks)" in done.out
    assert not any("time_exchange" in row for row in rows())


@pytest.mark.thorough
def test_a_run_goes_on_without_the_servers_of_wandb(folder: Path) -> None:
    """One server that refuses, one that never answers: the run is done, and says it once."""
    pytest.importorskip("wandb")
    with socket.socket() as silent, socket.socket() as closed:
        for one in (silent, closed):
            one.bind(("127.0.0.1", 0))
        silent.listen(50)
        for one, name in ((closed, "closed"), (silent, "silent")):
            address = f"http://127.0.0.1:{one.getsockname()[1]}"
            environ = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40}
            words = flags(FEW | {"logging.wandb": "true", "name": name})
            done = wait(start(folder, ["train", *words], environ=environ), folder, 180)
            assert done.code == 0 and "done: 4 steps" in done.out
            assert done.err.count("W&B is not reachable") == 1, done.err
            assert len([row for row in rows(name) if "loss" in row]) == 4


@pytest.mark.thorough
def test_tensorboard_shows_the_run(folder: Path) -> None:
    """Its page, drawn by a browser without a window, has the curves."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None or find_spec("tensorboard") is None:
        pytest.skip("needs Chromium and TensorBoard")
    assert main(["train", *flags({"logging.tensorboard": "true", "logging.every": "1"})]) == 0
    port = free_port()
    board = [sys.executable, "-m", "tensorboard.main", "--logdir", "runs/small/tensorboard"]
    server = subprocess.Popen(
        [*board, "--port", str(port), "--host", "127.0.0.1"], stderr=subprocess.DEVNULL
    )
    try:
        address = f"http://127.0.0.1:{port}/#timeseries"
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        page = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
             "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", f"--user-data-dir={folder}/browser", "--window-size=1400,1000",
             "--virtual-time-budget=20000", "--dump-dom", address],
            capture_output=True, text=True, timeout=180, check=False,
        ).stdout  # fmt: skip
    finally:
        server.kill()
        server.wait()
    # A card of the first group (others are drawn when they are scrolled to), groups, the picture.
    for name in ("time/compute", "train", "val", "loss"):
        assert f'title="{name}"' in page, name
