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

from dtt.data.loader import Batch
from dtt.data.windows import IGNORED
from dtt.dist import Place, Runtime
from dtt.model.decoder import Decoder
from dtt.model.experts import MoE
from dtt.model.recompute import Recompute
from dtt.optim.schedule import learning_rate
from dtt.training.step import Stepper

ALONE = Runtime(Place(), torch.device("cpu"))


def gradients(**changes: str) -> dict[str, Tensor]:
    settings = {key.replace("__", "."): value for key, value in changes.items()}
    stepper = build_stepper(small_config({"model.dropout": "0"} | settings), ALONE)
    return named_results(stepper, stepper.step(documents_batch(), 0))


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
    model = stepper.model.stages[0].model
    loss = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten())
    parameters = stepper.model.named_parameters()
    expected = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
    result = stepper.step(batch, 0)
    assert result.tokens == 8 * 32
    torch.testing.assert_close(result.totals[0] / result.tokens, loss.double(), rtol=1e-6, atol=0)
    found = {name: parameter.grad for name, parameter in parameters.items()}
    assert_close(found, expected, 1e-6)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    torch.testing.assert_close(result.grad_norm, norm, rtol=1e-6, atol=0)


def test_documents_apart_and_padding_are_the_mean_loss_of_each_alone() -> None:
    """Against autograd on every document in a forward of its own."""
    stepper = build_stepper(small_config({"model.dropout": "0"}), ALONE)
    batch, model = documents_batch(), stepper.model.stages[0].model
    losses = [
        F.cross_entropy(model(tokens[None, a:b])[0], targets[a:b], reduction="sum")
        for row, (tokens, targets) in enumerate(zip(batch.tokens, batch.targets, strict=True))
        for a, b in DOCUMENTS
        if row % 3 or b <= 20
    ]
    assert batch.count == 8 * 32 - 3 * 12
    loss = torch.stack(losses).sum() / batch.count
    parameters = stepper.model.named_parameters()
    expected = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
    result = stepper.step(batch, 0)
    assert (result.tokens, result.seen) == (batch.count, 1000)
    torch.testing.assert_close(result.totals[0] / result.tokens, loss.double(), rtol=1e-6, atol=0)
    assert_close({n: p.grad for n, p in parameters.items()}, expected, 2e-6)


@pytest.mark.parametrize("dropout", ["0", "0.1"])
@pytest.mark.parametrize("micro", ["4", "2", "1"])
def test_accumulation_changes_nothing(micro: str, dropout: str) -> None:
    """Neither the losses nor the gradients."""
    divided = gradients(training__micro_batch_size=micro, model__dropout=dropout)
    assert_close(divided, gradients(model__dropout=dropout), 1e-6)


def test_dropout_changes_what_is_computed() -> None:
    dropped, whole = gradients(model__dropout="0.1"), gradients()
    norms = [float((dropped[n] - whole[n]).norm() / whole[n].norm()) for n in whole if "mlp" in n]
    assert min(norms) > 0.1


EXPERTS = {"model.experts.number": "4", "model.experts.balance_weight": "0.5"}


def auxiliary_loss(model: Decoder, batch: Batch) -> Tensor:
    """The balance loss of all blocks on the whole batch, from what their routers say."""
    losses: list[Tensor] = []

    def add(layer: MoE, inputs: tuple[Tensor], output: Tensor) -> None:
        _, chosen, scores = layer.router(inputs[0])
        losses.append(layer.auxiliary_loss(scores, F.one_hot(chosen, 4).sum((1, 2))))

    hooks = [layer.register_forward_hook(add) for layer in model.experts()]
    model(batch.tokens, batch.positions)
    for hook in hooks:
        hook.remove()
    return torch.stack(losses).sum()


@pytest.mark.parametrize("micro", ["8", "2"])
@pytest.mark.parametrize("fp16", [False, True])
def test_the_gradient_is_that_of_the_mean_loss_and_the_balance_of_experts(
    micro: str, fp16: bool
) -> None:
    """The loss that is told is the cross-entropy alone."""
    settings = EXPERTS | {"model.dropout": "0", "training.micro_batch_size": micro}
    stepper = build_stepper(small_config(settings), ALONE)
    stepper.scaler = torch.amp.GradScaler("cpu", enabled=fp16, init_scale=1024.0)
    batch, model = documents_batch(), stepper.model.stages[0].model.eval()
    logits = model(batch.tokens, batch.positions).flatten(0, 1)
    loss = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED)
    auxiliary = auxiliary_loss(model, batch) / batch.count
    assert auxiliary.item() > 0.5  # two blocks, 0.5 each, where balance is perfect
    parameters = stepper.model.named_parameters()
    gradients_ = torch.autograd.grad(loss + auxiliary, parameters.values())
    expected = dict(zip(parameters, gradients_, strict=True))
    model.train()
    result = stepper.step(batch, 0)
    torch.testing.assert_close(result.totals[0] / result.tokens, loss.double(), rtol=1e-6, atol=0)
    assert_close({n: p.grad for n, p in parameters.items()}, expected, 5e-6)


def test_an_update_balances_experts_by_their_bias() -> None:
    settings = EXPERTS | {"model.experts.balance": "bias", "training.micro_batch_size": "2"}
    stepper = build_stepper(small_config(settings), ALONE)
    stepper.step(synthetic_batch(0), 0)
    routers = [layer.router for layer in stepper.model.stages[0].model.experts()]
    counts = [router.counts.clone() for router in routers]
    assert len(counts) == 2 and all(int(count.sum()) == 8 * 32 * 2 for count in counts)
    stepper.update(1.0)
    for router, count in zip(routers, counts, strict=True):
        assert torch.equal(router.bias, 0.001 * torch.sign(128.0 - count))


def test_gradient_checkpointing_changes_nothing() -> None:
    """Also with dropout, whose masks are computed again when a block is recomputed."""
    for dropout in ("0", "0.1"):
        config = small_config({"model.dropout": dropout})
        results = []
        for recompute in (False, True):
            stepper = build_stepper(config, ALONE)
            stepper.model.stages[0].model.recompute = Recompute() if recompute else None
            result = stepper.step(synthetic_batch(0), 0)
            results.append(named_results(stepper, result))
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_dropout_is_a_function_of_seed_step_and_sample() -> None:
    stepper = build_stepper(small_config(), ALONE)

    def loss(step: int) -> float:
        torch.rand(step + 3)  # what was drawn before does not matter
        stepper.optimizer.zero_grad()
        return float(stepper.step(synthetic_batch(0), step).totals[0])

    first, second = loss(0), loss(1)
    assert first != second and loss(0) == first and loss(1) == second
    stepper.seed += 1
    assert loss(0) != first
    # The two micro-batches of a step have different masks, though their rows are equal.
    twin = build_stepper(small_config({"training.micro_batch_size": "4"}), ALONE)
    parts: list[float] = []
    twin.model.stages[0].register_forward_hook(lambda *call: parts.append(call[-1].item()))
    batch = synthetic_batch(0)
    rows = [0, 1, 2, 3, 0, 1, 2, 3]
    batch = replace(batch, tokens=batch.tokens[rows], targets=batch.targets[rows])
    twin.step(batch, 0)
    assert parts[0] != parts[1]


def test_a_wish_to_stop_is_counted() -> None:
    stepper = build_stepper(small_config(), ALONE)
    assert stepper.step(synthetic_batch(0), 0, stop=lambda: True).totals[1] == 1
    assert stepper.step(synthetic_batch(0), 0).totals[1] == 0


def test_ten_steps_of_a_plain_pytorch_loop() -> None:
    """AdamW, cross_entropy, clip_grad_norm_: bit for bit, since 256 targets divide exactly."""
    config = small_config({"model.dropout": "0", "optimizer.name": "adamw"})
    stepper: Stepper = build_stepper(config, ALONE)
    stepper.grad_clip = 0.5
    model = build_stepper(config, ALONE).model.stages[0].model  # the same initial weights
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
        result = stepper.step(batch, step)
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
    ours = stepper.model.stages[0].model.state_dict()
    assert all(torch.equal(ours[name], theirs) for name, theirs in model.state_dict().items())


def test_the_learning_rate_is_peak_times_factor() -> None:
    stepper = build_stepper(small_config(), ALONE)
    stepper.step(synthetic_batch(0), 0)
    stepper.update(0.25)
    assert {group["lr"] for group in stepper.optimizer.param_groups} == {4e-3 * 0.25}
    assert all(p.grad is None for p in stepper.parameters)
