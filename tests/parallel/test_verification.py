"""`dtt verify parallel`: green for what ships, red for a layout that does not do its work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from dtt import verification
from dtt.config.layers import preset_names
from dtt.config.load import load_config
from dtt.config.model import Model
from dtt.config.optim import AdamW, Muon, Sgd
from dtt.config.schema import Config
from dtt.errors import NumericError
from dtt.verification import ALONE, CASES, Case, compare, run, shrink, verify_command

pytestmark = pytest.mark.processes
OPTIMIZERS = (Muon(), AdamW(), Sgd())


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three steps, and no trace in the environment."""
    before = dict(os.environ)
    monkeypatch.setattr(verification, "STEPS", 3)
    yield
    os.environ.clear()
    os.environ.update(before)


def kinds() -> dict[str, Model]:
    """The models of all presets made small, each kind once, by the first preset that has it."""
    found: dict[str, Model] = {}
    for name in preset_names():
        model = shrink(load_config([name]).model)
        if model not in found.values():
            found[name] = model
    return found


KINDS = kinds()


@pytest.mark.parametrize("number", range(len(KINDS)), ids=list(KINDS))
def test_every_preset_trains_alike_in_every_layout(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(
        model=list(KINDS.values())[number], optimizer=OPTIMIZERS[number % len(OPTIMIZERS)]
    )
    assert verify_command(config) == 0
    shown = capsys.readouterr().out
    assert shown.count(" same") == len(CASES) and "DIFFERS" not in shown


def test_a_missing_reduction_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(objective: nn.Module, **options: Any) -> nn.Module:
        return objective

    alone = run(Config(), ALONE)
    monkeypatch.setattr("dtt.parallel.apply.DistributedDataParallel", forgetful)
    case = Case("DDP", 2, {}, 4)
    found = compare(run(Config(), case, alone), alone)
    assert found.gradient > 0.1 and "step" in found.parameter and not found.within(case)


def test_a_wrong_gradient_of_one_parameter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from dtt.training.step import Stepper

    case, true_step = Case("FSDP2", 2, {"shard": 2}, 4), Stepper.step

    def step(self: Stepper, *arguments: Any, **options: Any) -> Any:
        result = true_step(self, *arguments, **options)
        wrong = dict(self.objective.named_parameters())["model.blocks.1.mlp.up.weight"]
        wrong.grad = torch.zeros_like(wrong)
        return result

    alone = run(Config(), ALONE)
    monkeypatch.setattr(Stepper, "step", step)
    found = compare(run(Config(), case, alone), alone)
    assert found.parameter.startswith("blocks.1.mlp.up.weight") and not found.within(case)


def test_a_layout_that_differs_ends_with_the_code_of_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    off = verification.Difference(0.0, 0.0, 0.5, "embed.weight, step 2", 0.0)
    monkeypatch.setattr(verification, "run", lambda *arguments: {})
    monkeypatch.setattr(verification, "compare", lambda *arguments: off)
    with pytest.raises(NumericError) as error:
        verify_command(Config())
    assert "embed.weight, step 2 is 5.0e-01 off" in error.value.what
    assert capsys.readouterr().out.count("DIFFERS") == len(CASES)
