"""Lightning's Trainer trains what dtt's own loop trains, and each continues the other's runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import (
    STEPS,
    assert_same_run,
    command,
    final_tensors,
    flags,
    losses,
    small_config,
    write_text,
)

from dtt import load_run
from dtt.cli import main
from dtt.config.schema import Config
from dtt.data.loader import Batch, Loader
from dtt.errors import CheckpointError, ConfigError, NumericError
from dtt.metrics.loggers import read_metrics
from dtt.parallel.layout import Layout
from dtt.training.engine import refuse_for_engine, require_engine
from dtt.training.launch import train

if find_spec("lightning") is None:
    pytest.skip("lightning is not installed", allow_module_level=True)

LIGHTNING = {"training.engine": "lightning"}


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """Import Lightning here, once: it takes seconds."""
    require_engine(small_config(LIGHTNING).training)


def small(name: str, **changes: str) -> Config:
    """The small run by a name; the keys of `changes` have __ for the dot."""
    return small_config({"name": name} | {k.replace("__", "."): v for k, v in changes.items()})


def trainer(**options: Any) -> Any:
    """A Trainer as somebody makes it for a test."""
    from lightning import Trainer

    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False}
    return Trainer(**{**defaults, **quiet, "enable_checkpointing": False, **options})


def fit(config: Config, ckpt_path: Path | None = None, **options: Any) -> Any:
    """Train in a Trainer of one's own, and return it."""
    from dtt.lightning import DttData, DttModule

    made = trainer(**options)
    made.fit(DttModule(config), DttData(config), ckpt_path=ckpt_path)
    return made


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[Batch], None]) -> None:
    """Have `action` called once, when the batch of a step (from 0) is made."""
    whole = Loader.batch
    done: list[int] = []

    def batch(self: Loader, number: int) -> Batch:
        made = whole(self, number)
        if number == step and not done:
            done.append(number)
            action(made)
        return made

    monkeypatch.setattr(Loader, "batch", batch)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer__name": "muon", "training__accumulation": "4"},
        {"optimizer__name": "adamw", "training__batch_size": "6", "training__accumulation": "3"},
        pytest.param({"optimizer__name": "sgd"}, marks=pytest.mark.thorough),
        pytest.param(
            {"model__experts__number": "4", "model__experts__active": "2"},
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            {"data__packing": "best-fit", "training__gradient_checkpointing": "true"},
            marks=pytest.mark.thorough,
        ),
    ],
    ids=["muon", "adamw", "sgd", "experts", "packed"],
)
def test_losses_and_weights_are_those_of_dtts_own_loop(
    folder: Path, changes: dict[str, str]
) -> None:
    """Bit for bit, which is more than 1e-6 of them."""
    train(small("ours", **changes))
    train(small("theirs", training__engine="lightning", **changes))
    assert len(losses(folder / "runs/ours")) == STEPS
    assert_same_run(folder / "runs/ours", folder / "runs/theirs")
    figures = [read_metrics(folder / f"runs/{name}/metrics.jsonl") for name in ("ours", "theirs")]
    same = [[row for row in rows if "interval_seconds" not in row] for rows in figures]
    assert same[0] == same[1]  # learning rates, norms, tokens, samples and validations too


@pytest.mark.parametrize(
    "engines",
    [
        ("lightning", "dtt"),
        ("dtt", "lightning"),
        pytest.param(("lightning",), marks=pytest.mark.thorough),
    ],
)
def test_either_engine_goes_on_where_the_other_was_stopped(
    folder: Path, engines: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small("whole"))
    at_step(monkeypatch, 13, lambda batch: os.kill(os.getpid(), signal.SIGTERM))
    stopped = train(small("parts", training__engine=engines[0]))
    assert not stopped.complete and stopped.step in range(10, 15)  # batches are made ahead
    done = train(small("parts", training__engine=engines[-1]))
    assert done.complete and done.step == STEPS
    assert_same_run(folder / "runs/whole", folder / "runs/parts")
    assert train(small("parts", training__engine=engines[0])).complete  # nothing is left to do


def test_a_signal_ends_the_command_with_its_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(monkeypatch, 9, lambda batch: os.kill(os.getpid(), signal.SIGUSR1))
    assert main(["train", *flags(), "--engine", "lightning"]) == 75
    said = capsys.readouterr()
    assert "saved; the same command goes on from there" in said.out and said.err == ""
    assert "Lightning" not in said.out  # the console is that of dtt
    assert load_run("runs/small", checkpoint="last").config.training.engine == "lightning"
    assert main(["evaluate", "runs/small"]) == 0
    assert main(["generate", "runs/small", "--prompt", "the", "--max-length", "4"]) == 0


def test_a_loss_that_is_not_finite_changes_no_weight(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dtt.model.objective import Objective

    whole, calls = Objective.forward, [0]

    def forward(self: Objective, *args: Any, **given: Any) -> Any:
        calls[0] += self.training
        return whole(self, *args, **given) * (float("nan") if calls[0] == 6 else 1.0)

    monkeypatch.setattr(Objective, "forward", forward)
    assert main(["train", *flags(), "--engine", "lightning"]) == NumericError.exit_code
    assert "step 6: the loss is nan" in capsys.readouterr().err
    assert load_run("runs/small", checkpoint="last").step == 4


@pytest.mark.processes
def test_two_ranks_train_as_those_of_dtts_own_loop(folder: Path) -> None:
    changes = {"parallel.world_size": "2", "training.micro_batch_size": "2"}
    for name, engine in (("ours", "dtt"), ("theirs", "lightning")):
        more = {"name": name, "training.engine": engine}
        done = command(folder, ["train", *flags(changes | more)])
        assert (done.code, done.err) == (0, "")
    assert_same_run(folder / "runs/ours", folder / "runs/theirs")


def test_what_lightning_does_not_do_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *flags(LIGHTNING | {"training.fp8": "true"})]) == 2
    said = capsys.readouterr().err
    assert "training.engine lightning does not do training.fp8" in said and said.count("\n") == 1
    assert not (folder / "runs/small").exists()
    layout = Layout(replicate=2, shard=2)
    training = small_config(LIGHTNING).training
    with pytest.raises(ConfigError, match=r"ranks divide \(replicate 2 x shard 2\)"):
        refuse_for_engine(training, layout, torch.float32)
    with pytest.raises(ConfigError, match="fp16"):
        refuse_for_engine(training, Layout(replicate=2), torch.float16)
    refuse_for_engine(training, Layout(replicate=2), torch.bfloat16)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtt.training.engine.is_installed", lambda name: False)
    with pytest.raises(ConfigError, match=r"pip install 'dtt\[lightning\]'"):
        require_engine(small_config(LIGHTNING).training)


def test_a_trainer_of_ones_own_makes_the_same_run(folder: Path) -> None:
    """With what people add to a Trainer: a stop that looks at val_loss, and Lightning's files."""
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    config = small("theirs", training__accumulation="2")
    train(small("ours", training__accumulation="2"))
    saving = ModelCheckpoint(folder / "ckpt", every_n_train_steps=7, save_top_k=-1)
    made = fit(
        config,
        callbacks=[saving, EarlyStopping("val_loss", patience=3)],
        enable_checkpointing=True,
        val_check_interval=20,
        num_sanity_val_steps=2,
    )
    assert made.global_step == STEPS
    assert_same_run(folder / "runs/ours", folder / "runs/theirs")
    assert load_run("runs/theirs", checkpoint="last").step == STEPS
    rows = (folder / "runs/theirs/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    validated = {row["step"]: row["val_loss"] for row in map(json.loads, rows) if "val_loss" in row}
    assert validated.keys() == {10, 20, STEPS}  # where both asked for one there is one
    assert float(made.callback_metrics["val_loss"]) == pytest.approx(validated[STEPS])

    # Lightning's own checkpoint, in a run of another name, and without the steps after it.
    again = small("again", training__accumulation="2")
    (path,) = (folder / "ckpt").glob("*step=14.ckpt")
    fit(again, path)
    ours, found = losses(folder / "runs/ours"), losses(folder / "runs/again")
    assert found == {step: ours[step] for step in range(15, STEPS + 1)}
    left, right = (final_tensors(folder / "runs" / name) for name in ("ours", "again"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_trainer_that_would_train_something_else_is_refused(folder: Path) -> None:
    wrong = {
        "precision": {"precision": "bf16-mixed"},
        "gradient_clip_val": {"gradient_clip_val": 0.5},
        "accumulates 3 batches": {"accumulate_grad_batches": 3},
    }
    for message, options in wrong.items():
        with pytest.raises(ConfigError, match=message):
            fit(small("refused"), **options)
    with pytest.raises(ConfigError, match=r"training\.device is cuda"):
        fit(small("refused", training__device="cuda"))
    from lightning.pytorch.demos.boring_classes import BoringModel

    from dtt.lightning import DttData, DttModule

    with pytest.raises(ConfigError, match="DttData gives batches to a DttModule only"):
        trainer().fit(BoringModel(), DttData(small("refused")))
    with pytest.raises(ConfigError, match="differ in seed"):
        trainer().fit(DttModule(small("refused")), DttData(small("refused", seed="2")))
    fit(small("other", training__max_steps="2"), limit_train_batches=2)  # the lock is free


def test_a_trainers_own_limit_saves_what_there_is(folder: Path) -> None:
    fit(small("small"), max_steps=6)
    assert load_run("runs/small", checkpoint="last").step == 6
    train(small("small"))
    train(small("whole"))
    assert_same_run(folder / "runs/whole", folder / "runs/small")


def test_a_checkpoint_within_a_step_is_refused(folder: Path) -> None:
    from lightning.pytorch.callbacks import Callback

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 7:
                trainer.save_checkpoint(folder / "within.ckpt")

    config = small("first", training__accumulation="2", training__max_steps="6")
    fit(config, callbacks=[Saves()])
    with pytest.raises(CheckpointError, match="after 7 forwards, in the midst of a step of 2"):
        fit(small("second", training__accumulation="2"), folder / "within.ckpt")


SCRIPT = """
from lightning import Trainer
from small_run import small_config
from dtt.lightning import DttData, DttModule

config = small_config({"name": "theirs", "training.micro_batch_size": "2"})
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False)
trainer.fit(DttModule(config), DttData(config))
"""


@pytest.mark.thorough
@pytest.mark.processes
def test_ranks_that_lightning_starts(folder: Path) -> None:
    """DDP of one's own Trainer and of torchrun, against two ranks of dtt's."""
    done = command(
        folder,
        ["train", *flags({"parallel.world_size": "2", "training.micro_batch_size": "2"})],
    )
    assert done.code == 0
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    paths = [str(Path(__file__).parent), *sys.path]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    words = flags({"name": "launched", "training.micro_batch_size": "2", **LIGHTNING})
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for arguments in (["script.py"], [*torchrun, "-m", "dtt", "train", *words]):
        ended = subprocess.run(
            [sys.executable, *arguments],
            env=environ,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ended.returncode == 0, ended.stderr
    for name in ("theirs", "launched"):
        assert_same_run(folder / "runs/small", folder / "runs" / name)


def test_text_that_is_new_to_a_checkpoint_is_refused(folder: Path) -> None:
    fit(small("first", training__max_steps="2")).save_checkpoint(folder / "a.ckpt")
    write_text(folder / "text.txt", seed=1)
    with pytest.raises(CheckpointError, match="no checkpoint of a DttModule on this text"):
        fit(small("second"), folder / "a.ckpt")
