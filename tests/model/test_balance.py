"""How tokens are spread over experts: the auxiliary loss against its formula, and biases."""

from __future__ import annotations

import pytest
import torch
from test_decoder import decoder, random_tokens
from test_experts import experts, states
from torch import Tensor

from dtt.model.experts import MoE, move_biases
from dtt.model.recompute import Recompute


def balance_by_formula(layer: MoE, x: Tensor) -> Tensor:
    """DeepSeek-V3, equations 17 to 20, for each sequence, times its tokens."""
    weight, active = layer.settings.balance_weight, layer.settings.active
    total = torch.zeros(())
    for sequence in x:
        logits = sequence @ layer.router.weight.T
        scores = logits.softmax(-1) if layer.settings.scoring == "softmax" else logits.sigmoid()
        count, number = scores.shape
        chosen = torch.zeros_like(scores).scatter_(1, scores.topk(active).indices, 1.0)
        f = number / (active * count) * chosen.sum(0)
        p = (scores / scores.sum(-1, keepdim=True)).mean(0)
        total = total + weight * (f * p).sum() * count
    return total


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_auxiliary_loss_adds_its_gradient_and_nothing_else(scoring: str, scale: float) -> None:
    layer = experts(active=2, scoring=scoring, balance_weight=0.5).train()
    upstream, parameters = states(3, 7, seed=2), list(layer.parameters())
    layer.scale.fill_(scale)
    x = states(3, 7).requires_grad_()
    y = layer(x)
    found = torch.autograd.grad((y * upstream).sum(), [x, *parameters])
    plain = layer.eval()(x)
    assert torch.equal(y, plain)
    explicit = (plain * upstream).sum() + scale * balance_by_formula(layer, x)
    expected = torch.autograd.grad(explicit, [x, *parameters])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()))
    without = torch.autograd.grad((layer(x) * upstream).sum(), layer.router.weight)[0]
    router = 1 + [name for name, _ in layer.named_parameters()].index("router.weight")
    assert float((found[router] - without).norm() / without.norm()) > 0.001


def test_the_auxiliary_loss_does_not_depend_on_how_sequences_are_batched() -> None:
    layer, x = experts(active=2, balance_weight=1.0).train(), states(6, 10)

    def gradient(*parts: Tensor) -> Tensor:
        layer.zero_grad()
        for part in parts:
            (layer(part) * 0).sum().backward()
        assert layer.router.weight.grad is not None
        return layer.router.weight.grad

    whole = gradient(x)
    assert float(whole.abs().max()) > 0.01
    for parts in (x.split(2), x.split(1), (x.flip(0),)):
        torch.testing.assert_close(gradient(*parts), whole, rtol=1e-4, atol=1e-6)


def test_parts_of_a_sequence_that_add_up_their_figures_have_the_gradient_of_the_whole() -> None:
    """As ranks that share sequences: each has some of the tokens, and the sums of all."""
    layer, x = experts(active=2, balance_weight=1.0).train(), states(3, 10)
    (layer(x) * 0).sum().backward()
    assert layer.router.weight.grad is not None
    expected, figures = layer.router.weight.grad.clone(), []
    parts = x.split(5, dim=1)
    layer.sum_rows = lambda rows: figures.append(rows.detach()) or rows
    for part in parts:
        layer(part)
    layer.zero_grad()
    for i, part in enumerate(parts):
        layer.sum_rows = lambda rows, other=figures[1 - i]: rows + other
        (layer(part) * 0).sum().backward()
    torch.testing.assert_close(layer.router.weight.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_recomputed_blocks_give_the_same_gradients_bitwise(balance: str) -> None:
    results, style = [], {"experts": {"number": 8, "balance": balance, "balance_weight": 0.5}}
    for recompute in (False, True):
        model = decoder(**style).train()
        model.recompute = Recompute() if recompute else None
        model.scale_auxiliary(torch.tensor(0.3))
        loss = model(random_tokens(2, 24)).square().mean()
        loss.backward()
        model.rebalance(lambda counts: counts)
        buffers = [b for n, b in model.named_buffers() if n.endswith("bias")]
        results.append([loss.detach(), *(p.grad for p in model.parameters()), *buffers])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Balance by bias


def test_a_bias_moves_by_the_rate_towards_the_mean() -> None:
    model = decoder(experts={"number": 4, "balance": "bias", "bias_rate": 0.25}).train()
    model(random_tokens(2, 24)), model(random_tokens(3, 24))
    routers = [layer.router for layer in model.experts()]
    counts = [router.counts.clone() for router in routers]
    assert all(int(count.sum()) == 5 * 24 * 2 for count in counts)
    asked: list[Tensor] = []
    model.rebalance(lambda values: asked.append(values.clone()) or 3 * values)  # three equal ranks
    assert len(asked) == 1 and torch.equal(asked[0], torch.stack(counts))
    for router, count in zip(routers, counts, strict=True):
        assert router.bias is not None
        assert torch.equal(router.bias, 0.25 * torch.sign(60.0 - count))
        assert not router.counts.any()
    before = [router.bias.clone() for router in routers]
    model.eval()(random_tokens(2, 24))
    model.rebalance(lambda values: values)
    assert all(torch.equal(r.bias, b) for r, b in zip(routers, before, strict=True))


def largest_load(balance: str) -> float:
    """Train on tokens that prefer few experts; the most that one expert gets, over the mean."""
    torch.manual_seed(0)
    layer = experts(active=2, balance=balance, balance_weight=0.05, bias_rate=0.01).train()
    centre, optimizer = states(1, 1), torch.optim.SGD(layer.parameters(), lr=0.05)
    for step in range(160):
        x = 0.7 * states(4, 32, seed=step + 5) + centre
        loss = (layer(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if layer.router.bias is not None:
            move_biases([layer.router], lambda counts: counts)
    chosen = layer.eval().router(0.7 * states(16, 32, seed=1000) + centre)[1]
    counts = torch.bincount(chosen.flatten(), minlength=8).float()
    return float(counts.max() / counts.mean())


def test_balancing_evens_the_load() -> None:
    loads = {balance: largest_load(balance) for balance in ("none", "loss", "bias")}
    assert loads["none"] > 3 and loads["bias"] < 2 and loads["loss"] < 2, loads
