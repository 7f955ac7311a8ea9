"""One step against the arithmetic it promises, and against a plain PyTorch loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_run import (
    DOCUMENTS,
    build_stepper,
    documents_batch,
    named_results,
    small_config,
    synthetic_batch,
)
from torch import Tensor

from dtt.dist import Place, Runtime
from dtt.optim.schedule import learning_rate
from dtt.training.step import Stepper

ALONE = Runtime(Place(), torch.device("cpu"))


def gradients(**changes: str) -> dict[str, Tensor]:
    settings = {key.replace("__", "."): value for key, value in changes.items()}
    stepper = build_stepper(small_config({"model.dropout": "0"} | settings), ALONE)
    return named_results(stepper, stepper.step(documents_batch(), 0, stop=False))


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Compare by name, each tensor by the norm of the difference relative to its own norm."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = float((ours[name] - expected).norm() / expected.norm())
        assert error <= tolerance, f"{name}: {error:.2g}"


def test_the_gradient_is_that_of_the_mean_loss() -> None:
    """Against autograd on F.cross_entropy over all logits."""
    config = small_config({"model.dropout": "0"})
    stepper = build_stepper(config, ALONE)
    batch = synthetic_batch(0)
    model = stepper.objective.model
    loss = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten())
    parameters = dict(stepper.objective.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
    result = stepper.step(batch, 0, stop=False)
    assert result.tokens == 8 * 32
    torch.testing.assert_close(result.totals[0] / result.tokens, loss.double(), rtol=1e-6, atol=0)
    found = {name: parameter.grad for name, parameter in parameters.items()}
    assert_close(found, expected, 1e-6)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    torch.testing.assert_close(result.grad_norm, norm, rtol=1e-6, atol=0)


def test_documents_apart_and_padding_are_the_mean_loss_of_each_alone() -> None:
    """Against autograd on every document in a forward of its own."""
    stepper = build_stepper(small_config({"model.dropout": "0"}), ALONE)
    batch, model = documents_batch(), stepper.objective.model
    losses = [
        F.cross_entropy(model(tokens[None, a:b])[0], targets[a:b], reduction="sum")
        for row, (tokens, targets) in enumerate(zip(batch.tokens, batch.targets, strict=True))
        for a, b in DOCUMENTS
        if row % 3 or b <= 20
    ]
    assert batch.count == 8 * 32 - 3 * 12
    loss = torch.stack(losses).sum() / batch.count
    parameters = dict(stepper.objective.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
    result = stepper.step(batch, 0, stop=False)
    assert (result.tokens, result.seen) == (batch.count, 1000)
    torch.testing.assert_close(result.totals[0] / result.tokens, loss.double(), rtol=1e-6, atol=0)
    assert_close({n: p.grad for n, p in parameters.items()}, expected, 2e-6)


@pytest.mark.parametrize("micro", ["4", "2", "1"])
def test_accumulation_changes_nothing(micro: str) -> None:
    assert_close(gradients(training__micro_batch_size=micro), gradients(), 1e-6)


def test_gradient_checkpointing_changes_nothing() -> None:
    """Also with dropout, whose pattern is drawn again when a block is recomputed."""
    for dropout in ("0", "0.1"):
        config = small_config({"model.dropout": dropout})
        results = []
        for recompute in (False, True):
            stepper = build_stepper(config, ALONE)
            stepper.objective.model.recompute_blocks = recompute
            result = stepper.step(synthetic_batch(0), 0, stop=False)
            results.append(named_results(stepper, result))
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_dropout_is_a_function_of_seed_step_and_place() -> None:
    stepper = build_stepper(small_config(), ALONE)

    def loss(step: int) -> float:
        torch.rand(step + 3)  # what was drawn before does not matter
        stepper.optimizer.zero_grad()
        return float(stepper.step(synthetic_batch(0), step, stop=False).totals[0])

    first, second = loss(0), loss(1)
    assert first != second and loss(0) == first and loss(1) == second
    stepper.seed += 1
    assert loss(0) != first
    # The two micro-batches of a step draw different patterns, though their rows are equal.
    twin = build_stepper(small_config({"training.micro_batch_size": "4"}), ALONE)
    parts: list[float] = []
    twin.objective.register_forward_hook(lambda *call: parts.append(call[-1].item()))
    batch = synthetic_batch(0)
    rows = [0, 1, 2, 3, 0, 1, 2, 3]
    batch = replace(batch, tokens=batch.tokens[rows], targets=batch.targets[rows])
    twin.step(batch, 0, stop=False)
    assert parts[0] != parts[1]


def test_a_wish_to_stop_is_counted() -> None:
    stepper = build_stepper(small_config(), ALONE)
    assert stepper.step(synthetic_batch(0), 0, stop=True).totals[1] == 1
    assert stepper.step(synthetic_batch(0), 0, stop=False).totals[1] == 0


def test_ten_steps_of_a_plain_pytorch_loop() -> None:
    """AdamW, cross_entropy, clip_grad_norm_: bit for bit, since 256 targets divide exactly."""
    config = small_config({"model.dropout": "0", "optimizer.name": "adamw"})
    stepper: Stepper = build_stepper(config, ALONE)
    stepper.grad_clip = 0.5
    model = build_stepper(config, ALONE).objective.model  # the same initial weights
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
        fused=True,
    )
    for step in range(10):
        batch, factor = synthetic_batch(step), learning_rate(config.schedule, step, 10)
        result = stepper.step(batch, step, stop=False)
        stepper.update(factor)

        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * factor
        optimizer.step()

        assert norm > 0.5 and torch.equal(result.grad_norm, norm)
        torch.testing.assert_close(result.totals[0] / 256, loss.double(), rtol=1e-6, atol=0)
    ours = stepper.objective.model.state_dict()
    assert all(torch.equal(ours[name], theirs) for name, theirs in model.state_dict().items())


def test_the_learning_rate_is_peak_times_factor() -> None:
    stepper = build_stepper(small_config(), ALONE)
    stepper.step(synthetic_batch(0), 0, stop=False)
    stepper.update(0.25)
    assert {group["lr"] for group in stepper.optimizer.param_groups} == {4e-3 * 0.25}
    assert all(p.grad is None for p in stepper.objective.parameters())
