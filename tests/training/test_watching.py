"""What a run says of itself: where its time goes, norms of its layers."""

from __future__ import annotations

import contextlib
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
from dtt.machine import free_port
from dtt.metrics.background import HASTE
from dtt.metrics.loggers import read_metrics
from dtt.metrics.meter import Cost, Meter
from dtt.metrics.peak import Peak
from dtt.metrics.trackers import PATIENCE, TRACKERS, Opening, TensorBoard
from dtt.training import build, refusals
from dtt.training import norms as norming
from dtt.training import run as running
from dtt.training import state as under_way
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


def test_a_peak_is_measured_again_until_the_meter_is_not_trusted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once at the line that finds it wrong, and not at the lines after it."""
    known, measured = Peak(1e3, "measured"), []

    def again(*given: object) -> Peak:
        measured.append(given)
        return known

    monkeypatch.setattr(running, "find_peak", lambda device, dtype: known)
    monkeypatch.setattr(under_way, "measure_again", again)
    assert main(["train", *flags(FEW | {"logging.every": "1"})]) == 0
    assert len(measured) == 1
    assert not any("mfu" in row for row in rows())


def test_fp8_is_shown_against_what_is_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With products that are not in fp8, which only some GPUs do; the peak is passed by far."""
    monkeypatch.setattr(refusals, "refuse_without_fp8", lambda device: None)
    monkeypatch.setattr(build, "use_fp8", lambda blocks: None)
    monkeypatch.setattr(running, "find_peak", lambda device, dtype: Peak(1e3, "published"))
    assert main(["train", *flags(FEW | {"training.fp8": "true"})]) == 0
    out, err = capsys.readouterr()
    assert "MFU  of 1 kFLOP/s, published, without fp8; " in out
    assert err == "" and any(row.get("mfu", 0) > 1 for row in rows())


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


def test_norms_are_waited_for_as_the_device_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is that of the device, and not of logging."""
    meters: list[Meter] = []
    waited: list[str] = []
    make = Meter.__init__

    def made(self: Meter, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        meters.append(self)

    class Norms:
        def __init__(self, model: Any, layers: list[str], runtime: Runtime) -> None:
            self.count = len(layers)

        def tolist(self) -> list[list[float]]:
            waited.append(meters[0]._part)
            return [[1.0] * self.count] * 2

    monkeypatch.setattr(Meter, "__init__", made)
    monkeypatch.setattr(norming, "layer_norms", Norms)
    words = {"logging.norms_every": "2", "training.grad_clip": "null"}
    assert main(["train", *flags(FEW | words)]) == 0
    assert waited == ["device", "device"]


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


# --- the end -------------------------------------------------------------------------------------


def test_trackers_have_less_time_after_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since other ranks are told of it only then."""
    given: list[float] = []
    monkeypatch.setattr(under_way, "close_all", lambda trackers, seconds: given.append(seconds))
    assert main(["train", *flags(FEW | {"name": "good"})]) == 0
    monkeypatch.setattr(Stepper, "step", lambda *_: torch.empty(1 << 58))
    assert main(["train", *flags(FEW | {"name": "bad"})]) == 70
    assert given == [PATIENCE, HASTE]


def test_a_run_that_is_complete_opens_and_measures_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []

    def peak(*given: object) -> Peak:
        opened.append("peak")
        return Peak(1e13, "measured")

    class Mine(TensorBoard):
        def __init__(self, opening: Opening) -> None:
            opened.append("tracker")
            super().__init__(opening)

    pytest.importorskip("tensorboard")
    monkeypatch.setattr(running, "find_peak", peak)
    monkeypatch.setitem(TRACKERS, "tensorboard", Mine)
    words = flags(FEW | {"logging.tensorboard": "true"})
    assert main(["train", *words]) == 0
    assert sorted(opened) == ["peak", "tracker"]
    capsys.readouterr()
    assert main(["train", *words]) == 0
    assert "is already complete: 4 steps" in capsys.readouterr().out
    assert sorted(opened) == ["peak", "tracker"]


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
