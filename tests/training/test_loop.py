"""When things happen in a run, how it is stopped, and how a batch is divided."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_run import flags, losses, small_config

from dtt.cli import main
from dtt.config.schema import Training
from dtt.dist import Place, Runtime
from dtt.errors import ConfigError, NumericError
from dtt.metrics.meter import Meter
from dtt.training.batching import divide
from dtt.training.loop import Due, Readings, _refuse_bad_weights
from dtt.training.picture import draw_loss, sparkline
from dtt.training.preemption import SIGNALS, Preemption, exit_on_preemption
from dtt.training.step import StepResult


def due(steps: int = 10, steps_per_epoch: float = 4.0, **changes: str) -> Due:
    settings = {key.replace("__", "."): value for key, value in changes.items()}
    return Due(small_config(settings), steps, steps_per_epoch)


def when(question: Any, steps: int = 10) -> list[int]:
    return [step for step in range(1, steps + 1) if question(step)]


def test_what_is_due() -> None:
    assert when(due(logging__every="4").log) == [1, 4, 8, 10]
    assert when(due(logging__norms_every="3").norms) == [3, 6, 9]
    assert when(due().norms) == []
    assert when(due(evaluation__every="3").evaluate) == [3, 6, 9, 10]
    assert when(due(evaluation__every="0").evaluate) == [10]
    assert when(due(checkpoint__every="5").checkpoint) == [5, 10]
    assert when(due(checkpoint__every="0").checkpoint) == [10]
    assert when(due(sample__every="5").sample) == []  # no prompts
    assert when(due(sample__every="5", sample__prompts="[Once]").sample) == [5, 10]


@pytest.mark.parametrize(
    ("epochs", "length", "expected"),
    [
        ("1", 4.0, [4, 8, 10]),
        ("0.5", 4.0, [2, 4, 6, 8, 10]),
        ("1", 2.5, [3, 5, 8, 10]),  # the first step at or behind each end of an epoch
        ("2", 0.4, list(range(1, 11))),  # an epoch shorter than a step
    ],
)
def test_checkpoints_by_epochs(epochs: str, length: float, expected: list[int]) -> None:
    question = due(10, length, checkpoint__every="0", checkpoint__every_epochs=epochs)
    assert when(question.checkpoint) == expected


def result(loss: float, norm: float = 1.0, stops: int = 0) -> StepResult:
    totals = torch.tensor([loss * 4, stops, 77.0], dtype=torch.float64)
    return StepResult(totals, torch.tensor(norm), 4)


def readings(device: str = "cpu", scaling: bool = False) -> tuple[Readings, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    run = SimpleNamespace(
        runtime=SimpleNamespace(device=torch.device(device)),
        stepper=SimpleNamespace(scaler=SimpleNamespace(is_enabled=lambda: scaling)),
        config=small_config({"optimizer.lr": "0.5"}),
        metrics=SimpleNamespace(write=lambda **figures: rows.append(figures)),
        meter=Meter(10),
    )
    return Readings(run), rows  # type: ignore[arg-type]


def test_a_cpu_reads_each_step_at_once() -> None:
    read, rows = readings()
    read.add(3, 12, 0.5, result(2.0))
    expected = {"step": 3, "loss": 2.0, "lr": 0.25, "grad_norm": 1.0, "tokens": 12, "samples": 77}
    assert rows == [expected] and not read.stop


def test_an_accelerator_is_read_one_step_late() -> None:
    read, rows = readings("cuda")
    read.add(1, 4, 1.0, result(2.0, stops=1))
    assert rows == [] and not read.stop
    read.add(2, 8, 1.0, result(1.5))
    assert [row["step"] for row in rows] == [1] and read.stop
    read.drain()
    assert [row["step"] for row in rows] == [1, 2] and read.last["loss"] == 1.5
    read.drain()
    assert len(rows) == 2


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_figures_that_are_not_finite_are_errors(loss: float, norm: float) -> None:
    read, rows = readings()
    with pytest.raises(NumericError, match=f"step 7: the loss is {loss} and the gradient norm"):
        read.add(7, 28, 1.0, result(loss, norm))
    assert rows == []


def test_with_loss_scaling_a_gradient_may_overflow() -> None:
    read, rows = readings(scaling=True)
    read.add(1, 4, 1.0, result(1.0, float("inf")))
    assert len(rows) == 1
    with pytest.raises(NumericError):
        read.add(2, 8, 1.0, result(float("nan")))


def test_a_signal_whose_exit_is_dropped_is_not_lost() -> None:
    """As in a callback of logging at a fork: Python prints what is raised there, and goes on."""
    with pytest.raises(SystemExit) as end, exit_on_preemption():
        with contextlib.suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        with Preemption() as preemption:
            assert preemption.asked()
        raise RuntimeError("what other code made of the exit")
    assert end.value.code == 75
    with exit_on_preemption(), Preemption() as preemption:
        assert not preemption.asked()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in SIGNALS}
    with Preemption() as preemption:
        assert preemption.requested is None
        os.kill(os.getpid(), number)
        assert preemption.requested == number
    assert {n: signal.getsignal(n) for n in SIGNALS} == before


def test_a_second_interrupt_stops_at_once() -> None:
    with Preemption() as preemption:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert preemption.requested == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_in_another_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def work() -> None:
        with Preemption() as preemption:
            seen.extend([signal.getsignal(signal.SIGTERM), preemption.requested])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, None]


def test_every_division_multiplies_out_or_is_refused() -> None:
    """All small triples: the division is exact, and it is refused only where none is."""
    for batch in range(1, 25):
        for ranks in range(1, 7):
            for micro in (None, *range(1, 9)):
                for accumulation in (None, *range(1, 5)):
                    training = Training(
                        batch_size=batch, micro_batch_size=micro, accumulation=accumulation
                    )
                    unit = (micro or 1) * (accumulation or 1) * ranks
                    possible = batch % unit == 0 and (not (micro and accumulation) or unit == batch)
                    try:
                        found = divide(training, ranks)
                    except ConfigError as error:
                        assert not possible and f"({batch})" in str(error)
                        assert f"({ranks})" in str(error)
                        continue
                    assert possible
                    assert found.micro_batch_size * found.accumulation * ranks == batch
                    assert micro in (None, found.micro_batch_size)
                    assert accumulation in (None, found.accumulation)
                    if micro is accumulation is None:
                        assert found.accumulation == 1


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "nearest"),
    [(8, None, 3, "6 and 9"), (8, 3, 2, "6 and 12"), (2, 3, 2, "6"), (100, 16, 4, "64 and 128")],
)
def test_the_nearest_batch_sizes(batch: int, micro: int | None, ranks: int, nearest: str) -> None:
    training = Training(batch_size=batch, micro_batch_size=micro)
    with pytest.raises(ConfigError, match=f"the nearest batch sizes are {nearest}$"):
        divide(training, ranks)


def test_what_a_run_leaves(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = flags({"sample.prompts": "[the cat]", "sample.every": "12", "sample.max_length": "5"})
    assert main(["train", *words]) == 0
    out, run = capsys.readouterr().out, Path("runs/small")
    assert {path.name for path in run.iterdir()} == {
        "checkpoints", "config.schema.json", "config.yaml", "lock", "logs", "loss.png",
        "metrics.jsonl", "progress.json", "samples.jsonl", "tokenizer.json",
    }  # fmt: skip
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [(row["step"], row["prompt"], len(row["text"])) for row in rows] == [
        (12, "the cat", 5),
        (24, "the cat", 5),
    ]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 25))
    assert [row["tokens"] for row in rows if "loss" in row] == [256 * n for n in range(1, 25)]
    measured = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in measured] == [10, 20, 24]
    best = min(measured, key=lambda row: row["val_loss"])
    assert (run / "checkpoints/best").read_text("utf-8").split() == [
        f"step-{best['step']:08d}",
        repr(best["val_loss"]),
    ]
    log = (run / "logs" / "train.log").read_text("utf-8")
    assert all(line in log for line in out.splitlines() if line.startswith("step"))
    for line in ("done: 24 steps in", "  dtt evaluate runs/small", "  dtt generate runs/small"):
        assert line in out


def test_dropout_does_not_depend_on_what_else_is_done(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Validation and samples draw random numbers; training does not notice."""
    assert main(["train", *flags({"evaluation.every": "0", "name": "plain"})]) == 0
    busy = {"evaluation.every": "3", "sample.every": "2", "sample.prompts": "[the]"}
    assert main(["train", *flags(busy | {"sample.max_length": "3"})]) == 0
    assert losses(Path("runs/small")) == losses(Path("runs/plain"))


def test_pictures(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 9.0 - step, "lr": 0.1} for step in range(1, 9)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert sparkline(tmp_path) == "loss 8.00 █▇▆▅▄▃▂▁ 1.00"
    assert sparkline(tmp_path, width=2) == "loss 6.50 █▁ 2.50"
    warnings: list[str] = []
    path = draw_loss(tmp_path, warnings.append)
    assert path is not None and path.read_bytes()[:4] == b"\x89PNG" and warnings == []


def test_a_share_of_nothing_has_no_bad_weights() -> None:
    """A rank may have no row of a small parameter."""
    parameters = [torch.ones(2), torch.empty(0)]
    run: Any = SimpleNamespace(
        stepper=SimpleNamespace(parameters=parameters),
        runtime=Runtime(Place(), torch.device("cpu")),
        state=SimpleNamespace(step=3),
    )
    _refuse_bad_weights(run)
    parameters[0][1] = float("nan")
    with pytest.raises(NumericError, match="step 3: its update made weights not finite"):
        _refuse_bad_weights(run)
