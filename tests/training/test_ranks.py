"""Several ranks train the same model as one, however they were started."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import (
    PRELOADED,
    STEPS,
    assert_same_run,
    build_stepper,
    command,
    documents_batch,
    final_tensors,
    flags,
    losses,
    named_results,
    small_config,
    start,
    step_on_rank,
    wait,
)
from torch import Tensor

from dtt.dist import Place, Runtime

pytestmark = pytest.mark.processes
Uninterrupted = Callable[[int], Path]


def figures(run: Path, name: str) -> dict[int, float]:
    """One figure of metrics.jsonl by step, where it is there."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["step"]: row[name] for row in rows if name in row}


def gradients(folder: Path, ranks: int, settings: dict[str, str]) -> dict[str, Tensor]:
    """Gradients and totals of the first step, by name, as rank 0 has them."""
    if ranks == 1:
        runtime = Runtime(Place(), torch.device("cpu"))
        stepper = build_stepper(small_config(settings), runtime)
        return named_results(stepper, stepper.step(documents_batch(), 0))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    arguments = [(folder, settings, rank, ranks, port) for rank in range(ranks)]
    processes = [context.Process(target=step_on_rank, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * ranks
    return load_file(folder / "gradients.safetensors")


@pytest.mark.parametrize(
    ("ranks", "micro", "dropout"),
    [
        (2, "4", "0"),
        (2, "2", "0"),  # two forwards each, of which only the last one synchronises
        (4, "1", "0"),
        (2, "4", "0.1"),
        (4, "1", "0.1"),
    ],
)
def test_ranks_and_accumulation_give_the_same_gradients(
    tmp_path: Path, ranks: int, micro: str, dropout: str
) -> None:
    settings = {"model.dropout": dropout, "training.micro_batch_size": micro}
    found = gradients(tmp_path, ranks, settings)
    expected = gradients(tmp_path, 1, settings | {"training.micro_batch_size": "8"})
    assert found.keys() == expected.keys() and len(found) > 10
    assert found.pop("totals")[1] == 1  # the one rank that wanted to stop
    expected.pop("totals")
    for name, theirs in expected.items():
        error = float((found[name] - theirs).norm() / theirs.norm())
        assert error <= 1e-6, f"{name}: {error:.2g}"


@pytest.mark.parametrize(
    ("ranks", "micro", "settings"),
    [
        (2, "4", {"parallel.shard": "2"}),
        (2, "2", {"parallel.shard": "-1", "parallel.reshard": "false"}),
        (4, "2", {"parallel.shard": "2"}),  # HSDP
        (4, "1", {"parallel.shard": "4", "model.tied_head": "true", "model.kv_heads": "2"}),
        (2, "4", {"parallel.shard": "2", "training.gradient_checkpointing": "true"}),
    ],
)
def test_divided_parameters_give_the_same_gradients(
    tmp_path: Path, ranks: int, micro: str, settings: dict[str, str]
) -> None:
    settings = settings | {"model.dropout": "0.1", "training.micro_batch_size": micro}
    found = gradients(tmp_path, ranks, settings)
    alone = {key: value for key, value in settings.items() if not key.startswith("parallel")}
    expected = gradients(tmp_path, 1, alone | {"training.micro_batch_size": "8"})
    assert found.keys() == expected.keys() and len(found) > 10
    del found["totals"], expected["totals"]
    for name, theirs in expected.items():
        error = float((found[name] - theirs).norm() / theirs.norm())
        assert error <= 1e-6, f"{name}: {error:.2g}"


LAYOUTS: tuple[dict[str, str], ...] = (
    {"world_size": "4", "shard": "4"},
    {"world_size": "2"},
    {"world_size": "2", "tensor": "2"},
    {"world_size": "2", "pipeline": "2"},
    {"world_size": "2", "context": "2"},
    {"world_size": "4", "tensor": "2", "pipeline": "2"},
    {},
)
MIXTURES: tuple[dict[str, str], ...] = (
    {"world_size": "2", "expert": "2"},
    {"world_size": "4", "shard": "2", "expert": "2"},
    {},
)
EXPERTS = {"model.experts.number": "4", "model.experts.balance": "bias", "model.layers": "2"}
DENSE = {
    "model.bias": "true",
    "model.positions.name": "learned",
    "model.kv_heads": "2",
    "model.vocab_size": "31",
    "model.layers": "4",
}


@pytest.mark.parametrize(
    ("layouts", "model", "optimizer", "off", "moved"),
    [
        (LAYOUTS, DENSE, "adamw", 1e-6, 2e-4),
        # Muon orthogonalizes in bf16.
        pytest.param(LAYOUTS, DENSE, "muon", 1e-4, 6e-2, marks=pytest.mark.thorough),
        (MIXTURES, EXPERTS, "adamw", 1e-6, 2e-4),
    ],
    ids=["adamw", "muon", "experts"],
)
def test_a_run_goes_on_from_one_layout_to_another(
    folder: Path,
    layouts: tuple[dict[str, str], ...],
    model: dict[str, str],
    optimizer: str,
    off: float,
    moved: float,
) -> None:
    """Two steps and an evaluation in each: figures and weights are those of one process."""
    steps = 2 * len(layouts)
    common = model | {
        "optimizer.name": optimizer,
        "training.max_steps": str(steps),
        "training.micro_batch_size": "2",
        "schedule.name": "constant",
        "schedule.warmup_steps": "2",
        "checkpoint.every": "0",
        "evaluation.every": "2",
    }
    alone = command(folder, ["train", *flags(common | {"name": "alone"})])
    assert (alone.code, alone.err) == (0, "")
    for number, layout in enumerate(layouts, 1):
        changes = {f"parallel.{axis}": size for axis, size in layout.items()}
        changes["training.max_steps"] = str(2 * number)
        done = command(folder, ["train", *flags(common | changes)])
        assert (done.code, done.err) == (0, ""), done.err
        assert number == 1 or f"from step {2 * number - 2}" in done.out
    one, several = Path("runs/alone"), Path("runs/small")
    for figure, count in (("loss", steps), ("val_loss", len(layouts))):
        expected, found = figures(one, figure), figures(several, figure)
        assert expected.keys() == found.keys() and len(found) == count
        assert list(found.values()) == pytest.approx(list(expected.values()), rel=off)
    whole, tensors = final_tensors(one), final_tensors(several)
    assert whole.keys() == tensors.keys()
    for name, tensor in whole.items():
        assert (tensors[name] - tensor).norm() <= moved * tensor.norm(), name


def test_a_run_on_two_ranks_is_that_with_two_forwards(
    folder: Path, uninterrupted: Uninterrupted
) -> None:
    done = command(folder, ["train", *flags({"training.micro_batch_size": "4"})])
    assert done.code == 0
    one, two = losses(Path("runs/small")), losses(uninterrupted(2))
    assert one.keys() == two.keys()
    assert one[1] == pytest.approx(two[1], rel=1e-6)
    assert list(one.values()) == pytest.approx(list(two.values()), rel=1e-3)


def test_torchrun(folder: Path, uninterrupted: Uninterrupted) -> None:
    """The run is bitwise that of --world-size 2, and what does not fit is refused."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", "2", "-m", "dtt.main", "train", *flags()],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"done: {STEPS} steps") == 1  # one rank speaks
    assert_same_run(Path("runs/small"), uninterrupted(2))


def test_module_names() -> None:
    for module in ("dtt", "dtt.main"):
        command = [sys.executable, "-m", module, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout.startswith("usage: dtt COMMAND")


def test_workers_stop_when_their_launcher_dies(folder: Path, uninterrupted: Uninterrupted) -> None:
    changes = {"parallel.world_size": "2", "logging.every": "1"}
    process = start(folder, ["train", *flags(changes)], slow=0.05)
    run, deadline = Path("runs/small"), time.monotonic() + 30
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    assert wait(process, folder).code == -signal.SIGKILL
    deadline = time.monotonic() + 5
    while alive := [child for child in children if Path("/proc", child, "cwd").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
    assert len(losses(run)) < STEPS
    done = command(folder, ["train", *flags(changes)])
    assert done.code == 0 and "continuing" in done.out
    assert_same_run(run, uninterrupted(2))
