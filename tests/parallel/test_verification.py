"""`dtt verify parallel`: green for what ships, red for a layout that does not do its work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtt.config.layers import preset_names
from dtt.config.load import load_config
from dtt.config.model import Experts, Model
from dtt.config.optim import AdamW, Muon, Sgd
from dtt.config.parallel import Parallel
from dtt.config.schema import Config
from dtt.errors import NumericError
from dtt.parallel import context, tensor
from dtt.parallel.layout import resolve
from dtt.parallel.pipeline import Pipeline
from dtt.verification import cases, report
from dtt.verification.cases import ALONE, LOOSE, Case, cases_for, shrink, small
from dtt.verification.report import Difference, compare, verify_command
from dtt.verification.training import run

pytestmark = pytest.mark.processes
OPTIMIZERS = (Muon(), AdamW(), Sgd())


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two steps, and no trace in the environment."""
    before = dict(os.environ)
    monkeypatch.setattr(cases, "STEPS", 2)
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
    going = cases_for(config)
    refused = sum("PP" in case.name for case in going) if config.model.tied_head else 0
    assert shown.count(" refused") == refused
    assert shown.count(" same") == len(going) - refused and "DIFFERS" not in shown


@pytest.mark.thorough
def test_dropout_is_the_same_in_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(model=Model(dropout=0.1))
    assert shrink(config.model).dropout == 0.1
    assert verify_command(config) == 0
    assert capsys.readouterr().out.count(" same") == len(cases_for(config))
    (found,), (other,) = run(config, [ALONE]), run(Config(), [ALONE])
    assert compare(found, other).gradient > 0.1  # it did act


def test_the_layout_that_is_asked_for_is_a_case() -> None:
    parallel = Parallel(replicate=3, tensor=4, pipeline=-1, schedule="interleaved")
    (own,) = [c for c in cases_for(Config(parallel=parallel)) if c.name.endswith("configured")]
    axes = {"pipeline": 2, "replicate": 2, "tensor": 2}
    assert (own.ranks, own.parallel) == (8, axes | {"schedule": "interleaved"})
    model = shrink(Config().model)
    assert resolve(small(Config(), own).parallel, model, own.ranks).data * own.micro == 4
    assert cases_for(Config()) == cases_for(Config(parallel=Parallel(tensor=8)))  # there already


@pytest.mark.parametrize(
    ("sizes", "case"),
    [
        ({"hidden": 5}, Case("rows 2, 2, 1 and 0", 4, {"shard": 4}, 2)),
        ({"hidden": 6}, Case("rows 2, 1 and 0", 8, {"shard": 4, "tensor": 2}, 2, *LOOSE)),
        ({"layers": 1}, Case("a matrix for two", 4, {"shard": 2, "tensor": 2}, 4, *LOOSE)),
    ],
    ids=["no row", "no row of a share", "no matrix"],
)
def test_muon_does_not_need_something_for_each_rank(
    sizes: dict[str, int], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank may have no row of a matrix, and no matrix to orthogonalize for the others."""
    monkeypatch.setattr(cases, "shrink", lambda model: shrink(model).model_copy(update=sizes))
    config = Config(optimizer=Muon())
    (alone,) = run(config, [ALONE])
    assert compare(run(config, [case], alone)[0], alone).within(case)


def apart(found: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, float, float]:
    """Largest relative differences of losses, of gradient norms, and of gradients in norm."""
    gradients = [
        float((found[name] - tensor).norm() / tensor.norm())
        for name, tensor in other.items()
        if ".gradient." in name
    ]
    losses, norms = (
        float(((found[name] - other[name]) / other[name]).abs().max())
        for name in ("losses", "norms")
    )
    return losses, norms, max(gradients)


@pytest.mark.parametrize(
    "preset", ["dtt-base", pytest.param("llama-3-8b", marks=pytest.mark.thorough)]
)
def test_bf16_differs_by_its_rounding_only(preset: str) -> None:
    """From one process in bf16, which differs from fp32 by 4e-6, 2e-3 and 2e-2; layouts by 1.1e-5,
    2.3e-3 (of TP, which rounds before it divides by the targets) and 1.2e-2."""
    config = Config(model=load_config([preset]).model.model_copy(update={"tied_head": False}))
    going = [
        replace(case, precision="bf16")
        for case in cases_for(config)
        if case.name in ("DDP", "FSDP2", "TP", "CP", "PP, 1F1B", "FSDP2 x TP", "TP x CP")
    ]
    (exact,) = run(config, [ALONE])
    (alone,) = run(config, [replace(ALONE, precision="bf16")])
    assert len(going) == 7 and apart(alone, exact)[2] > 3e-3
    found = [
        result
        for ranks in (2, 4)
        for result in run(config, [case for case in going if case.ranks == ranks], alone)
    ]
    for case, result in zip(going, found, strict=True):
        loss, norm, gradient = apart(result, alone)
        assert loss < 4e-5 and norm < 7e-3 and gradient < 4e-2, (case.name, loss, norm, gradient)
        assert apart(result, exact)[2] > 3e-3, f"{case.name} computes in fp32"


@pytest.mark.thorough
def test_compiled_blocks_train_alike_in_every_layout() -> None:
    """From one process that compiles, too; it rounds otherwise than one that does not."""
    config = Config(model=Model(layers=2, tied_head=False), optimizer=AdamW())
    compiled = config.training.model_copy(update={"compile": True})
    config = config.model_copy(update={"training": compiled})
    names = ("DDP", "FSDP2", "TP", "CP", "PP, 1F1B", "PP, interleaved", "FSDP2 x TP")
    going = [case for case in cases_for(config) if case.name in names]
    assert len(going) == len(names)
    (alone,) = run(config, [ALONE])
    for ranks in (2, 4):
        some = [case for case in going if case.ranks == ranks]
        for case, found in zip(some, run(config, some, alone), strict=True):
            assert compare(found, alone).within(case), (case.name, compare(found, alone))
    eager = config.training.model_copy(update={"compile": False})
    (other,) = run(config.model_copy(update={"training": eager}), [ALONE])
    assert any(not torch.equal(tensor, other[name]) for name, tensor in alone.items())


def test_a_rank_without_experts_takes_part_in_their_groups() -> None:
    """Of the stages of an interleaved pipeline, one rank's have none of them."""
    experts = Experts(number=4, every=2, balance="bias")
    config = Config(model=Model(experts=experts), optimizer=AdamW())
    parallel = {"pipeline": 2, "tensor": 2, "schedule": "interleaved"}
    case = Case("as balance wants it", 4, parallel, 2, *LOOSE)
    (alone,) = run(config, [ALONE])
    assert compare(run(config, [case], alone)[0], alone).within(case)


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
def test_a_loss_in_chunks_goes_through_a_pipeline(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtt.model.loss.LARGE_VOCABULARY", 1)
    (alone,) = run(Config(), [ALONE])
    case = Case(schedule, 2, {"pipeline": 2, "schedule": schedule}, 2, *LOOSE)
    assert compare(run(Config(), [case], alone)[0], alone).within(case)


def test_a_missing_reduction_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(objective: nn.Module, **options: Any) -> nn.Module:
        return objective

    (alone,) = run(Config(), [ALONE])
    monkeypatch.setattr("dtt.parallel.apply.DistributedDataParallel", forgetful)
    case = Case("DDP", 2, {}, 4)
    found = compare(run(Config(), [case], alone)[0], alone)
    assert found.gradient > 0.1 and "step" in found.parameter and not found.within(case)


def forget_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtt.parallel.model.sum_gradients", lambda *arguments: None)


def split_heads_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if q, k and v were one matrix: ranks have heads of others, or none of v."""
    true_shares = tensor.shares_of
    monkeypatch.setattr(
        tensor, "shares_of", lambda sizes, ranks, rank: true_shares([sum(sizes)], ranks, rank)
    )


def mix_up_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "_order", lambda length, ranks, device: torch.arange(length))


def scale_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    true_train = Pipeline.train
    monkeypatch.setattr(
        Pipeline, "train", lambda self, rows, given, by: true_train(self, rows, given, 2 * by)
    )


@pytest.mark.parametrize(
    ("fault", "axis", "parameter"),
    [
        (forget_norms, "tensor", "norm"),
        (split_heads_twice, "tensor", ""),
        (mix_up_pieces, "context", ""),
        (scale_twice, "pipeline", ""),
    ],
)
def test_a_wrong_plan_is_found(
    fault: Callable[[pytest.MonkeyPatch], None],
    axis: str,
    parameter: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (alone,) = run(Config(), [ALONE])
    case = Case(axis, 2, {axis: 2}, 2, *LOOSE)
    assert compare(run(Config(), [case], alone)[0], alone).within(case)
    fault(monkeypatch)
    found = compare(run(Config(), [case], alone)[0], alone)
    assert not found.within(case) and found.gradient > 0.01 and parameter in found.parameter


def test_a_wrong_gradient_of_one_parameter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from dtt.training.step import Stepper

    case, true_step = Case("FSDP2", 2, {"shard": 2}, 4), Stepper.step

    def step(self: Stepper, *arguments: Any, **options: Any) -> Any:
        result = true_step(self, *arguments, **options)
        wrong = self.model.named_parameters()["blocks.1.mlp.up.weight"]
        wrong.grad = torch.zeros_like(wrong)
        return result

    (alone,) = run(Config(), [ALONE])
    monkeypatch.setattr(Stepper, "step", step)
    found = compare(run(Config(), [case], alone)[0], alone)
    assert found.parameter.startswith("blocks.1.mlp.up.weight") and not found.within(case)


def test_a_layout_that_differs_ends_with_the_code_of_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    off = Difference(0.0, 0.0, 0.5, "embed.weight, step 2", 0.0)
    for name in ("run", "outcomes"):
        monkeypatch.setattr(report, name, lambda config, cases, alone=None: [{}] * len(cases))
    monkeypatch.setattr(report, "compare", lambda *arguments: off)
    with pytest.raises(NumericError) as error:
        verify_command(Config())
    assert "embed.weight, step 2 is 5.0e-01 off" in error.value.what
    assert capsys.readouterr().out.count("DIFFERS") == len(cases_for(Config()))
