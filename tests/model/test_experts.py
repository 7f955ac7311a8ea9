"""Mixtures of experts against a loop over tokens and against formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_decoder import decoder, random_tokens
from torch import Tensor

from dtt.config.load import load_config
from dtt.config.model import Experts, Model
from dtt.errors import ConfigError
from dtt.model.attention import Cache
from dtt.model.decoder import Decoder, count_active_parameters, count_parameters
from dtt.model.experts import MoE
from dtt.model.layers import ACTIVATIONS, MLP

DIM, HIDDEN = 16, 24
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"active": 2, "balance": "none"},
    "qwen": {"number": 16, "active": 4, "balance": "none"},
    "deepseek": {"scoring": "sigmoid", "shared": 2, "balance": "bias"},
    "not normalized": {"active": 3, "normalize": False, "balance": "none"},
    "one": {"active": 1, "normalize": False, "balance": "none"},
    "all": {"number": 4, "active": 4, "balance": "none"},
}
STYLES: dict[str, dict[str, Any]] = {
    name: {"norm": "rmsnorm", "activation": "swiglu", "experts": {"number": 8, "hidden": 48} | kind}
    for name, kind in KINDS.items()
} | {"gpt2": {"bias": True, "experts": {"number": 4, "every": 2}}}


def experts(activation: str = "swiglu", seed: int = 0, **settings: Any) -> MoE:
    """A layer with random parameters, and biases for choosing if it has them."""
    made = MoE(DIM, HIDDEN, activation, Experts(**({"number": 8} | settings)))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=draw)
        if made.router.bias is not None:
            made.router.bias.uniform_(-0.2, 0.2, generator=draw)
    return made


def states(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed))


def by_hand(layer: MoE, x: Tensor) -> Tensor:
    """Each token alone through each of its experts."""
    settings, rows = layer.settings, []
    for token in x.flatten(0, 1):
        logits = layer.router.weight @ token
        scores = logits.softmax(0) if settings.scoring == "softmax" else logits.sigmoid()
        ranked = scores.detach() + (0.0 if layer.router.bias is None else layer.router.bias)
        chosen = sorted(range(len(scores)), key=lambda e: -float(ranked[e]))[: settings.active]
        total = sum(scores[e] for e in chosen) if settings.normalize else 1.0
        row = torch.zeros(DIM) if layer.shared is None else layer.shared(token)
        for e in chosen:
            inner = layer.experts.up[e] @ token
            if layer.experts.gate is not None:
                inner = F.silu(layer.experts.gate[e] @ token) * inner
            else:
                inner = ACTIVATIONS["relu2"](inner)
            row = row + scores[e] / total * (layer.experts.down[e] @ inner)
        rows.append(row)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens(kind: str, activation: str) -> None:
    layer, upstream = experts(activation, **KINDS[kind]), states(3, 7, seed=2)
    results = []
    for forward in (layer, lambda x: by_hand(layer, x)):
        x = states(3, 7).requires_grad_()
        y = forward(x)
        gradients = torch.autograd.grad((y * upstream).sum(), [x, *layer.parameters()])
        results.append([y, *gradients])
    names = ["y", "x", *(name for name, _ in layer.named_parameters())]
    for name, found, expected in zip(names, *results, strict=True):
        scale = float(expected.detach().abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            found, expected, rtol=0, atol=2e-6 * scale, msg=lambda m, n=name: n + m
        )


def test_no_token_is_dropped_however_many_choose_an_expert() -> None:
    layer = experts(active=2, balance="none")
    x = states(1, 1).expand(4, 25, -1).contiguous()  # all choose the same two
    seen: list[Tensor] = []
    layer.apply_experts = lambda rows, counts: seen.append(counts) or layer.experts(rows, counts)
    y = layer(x)
    assert sorted(seen[0].tolist()) == [0] * 6 + [100] * 2
    torch.testing.assert_close(y, by_hand(layer, x[:1, :1]).expand_as(y), rtol=0, atol=1e-6)


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    layer = experts(active=2, balance="none")
    layer(states(1, 1)).sum().backward()
    for stack in (layer.experts.up, layer.experts.gate, layer.experts.down):
        assert stack is not None and stack.grad is not None
        assert sorted((g.abs().sum() > 0).item() for g in stack.grad) == [False] * 6 + [True] * 2


def test_replaced_experts_get_rows_in_the_order_of_experts() -> None:
    """What divides experts sends rows elsewhere: here to two layers that have half of them each."""
    layer, halves = experts(active=2), [experts(active=2) for _ in range(2)]
    for half, mine in zip(halves, (slice(0, 4), slice(4, 8)), strict=True):
        for name in ("up", "gate", "down"):
            stack = getattr(layer.experts, name).detach()[mine].clone()
            setattr(half.experts, name, torch.nn.Parameter(stack))

    def sent(rows: Tensor, counts: Tensor) -> Tensor:
        first = int(counts[:4].sum())
        return torch.cat(
            [
                halves[0].experts(rows[:first], counts[:4]),
                halves[1].experts(rows[first:], counts[4:]),
            ]
        )

    x = states(2, 9)
    expected = layer(x)
    layer.apply_experts = sent
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_does_not_depend_on_those_beside_it(kind: str) -> None:
    layer, x = experts(**KINDS[kind]), states(6, 10)
    with torch.no_grad():
        together, reversed_ = layer(x), layer(x.flip(0)).flip(0)
        alone = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(together, reversed_, rtol=0, atol=1e-6)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_bf16_is_computed_with_the_same_choices() -> None:
    layer, x = experts(active=2), states(2, 10).bfloat16()
    with torch.no_grad():
        rough, exact = layer(x), layer(x.float())
        assert torch.equal(layer.router(x)[1], layer.router(x.float())[1])
    assert rough.dtype == torch.bfloat16
    assert float((rough.float() - exact).norm() / exact.norm()) < 0.01


# In the decoder


def test_every_nth_block_has_experts() -> None:
    model = decoder(layers=6, experts={"number": 4, "every": 3})
    kinds = [type(block.mlp) for block in model.blocks]
    assert kinds == [MLP, MLP, MoE] * 2


def test_initial_weights_have_the_spread_they_are_said_to_have() -> None:
    model = decoder(dim=128, layers=8, init_std=0.02, experts={"number": 4, "shared": 1})
    for name, parameter in model.named_parameters():
        if "mlp." in name:
            down = name.endswith(("experts.down", "mlp.shared.down.weight"))
            expected = 0.02 / 4 if down else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.12), name


@pytest.mark.parametrize("style", STYLES)
def test_a_token_changes_nothing_before_it(style: str) -> None:
    model, tokens = decoder(**STYLES[style]), random_tokens(1, 24)
    changed = tokens.clone()
    changed[0, 10] = (tokens[0, 10] + 1) % 61
    with torch.no_grad():
        moved = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert float(moved[:10].max()) < 1e-5 and (moved[10:] > 1e-4).all()


@pytest.mark.parametrize("style", STYLES)
def test_cached_logits_are_those_of_the_whole_text(style: str) -> None:
    model, tokens = decoder(**STYLES[style]), random_tokens(2, 24)
    cache = Cache(model.settings, 2, 24, torch.zeros(2, dtype=torch.long), torch.float32)
    with torch.no_grad():
        expected = model(tokens)
        model.for_generation(torch.device("cpu"), torch.float32)
        parts = [model(part, cache=cache) for part in tokens.split([9, 1, 1, 13], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=2e-5)


def test_a_model_for_generation_routes_in_fp32() -> None:
    model, tokens = decoder(**STYLES["deepseek"]), random_tokens(2, 24)
    before = {n: t.clone() for n, t in model.state_dict().items() if ".router." in n}
    model.for_generation(torch.device("cpu"), torch.bfloat16)
    assert model(tokens).dtype == torch.bfloat16
    assert next(model.experts()).experts.up.dtype == torch.bfloat16
    after = {n: t for n, t in model.state_dict().items() if ".router." in n}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_model_that_is_built_without_memory_takes_over_weights() -> None:
    """As a trained run is loaded: what no checkpoint has must be there all the same."""
    model, tokens = decoder(**STYLES["deepseek"]), random_tokens(2, 24)
    with torch.device("meta"):
        loaded = Decoder(model.settings)
    loaded.load_state_dict(model.state_dict(), assign=True)
    assert not any(buffer.is_meta for buffer in loaded.buffers())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens), model(tokens))


def test_a_part_of_a_model_balances_the_blocks_that_it_has() -> None:
    model = decoder(**STYLES["deepseek"]).keep_part(range(1, 2), first=False, last=True)
    assert len(list(model.experts())) == 1
    model.scale_auxiliary(0.5)
    model.rebalance(lambda counts: counts)


def test_active_parameters_are_those_that_a_token_passes() -> None:
    settings = {"experts": {"number": 8, "active": 2, "hidden": 48, "shared": 1}}
    model, smaller = (
        decoder(experts=settings["experts"] | change) for change in ({}, {"number": 2})
    )
    routers = 2 * 6 * 32
    assert count_active_parameters(model) == count_parameters(smaller) + routers
    dense = decoder()
    assert count_active_parameters(dense) == count_parameters(dense)


@pytest.mark.parametrize(("preset", "billions"), [("mixtral-8x7b", 12.9), ("qwen3-30b-a3b", 3.35)])
def test_presets_have_the_published_number_of_active_parameters(
    preset: str, billions: float
) -> None:
    with torch.device("meta"):
        model = Decoder(load_config([preset]).model)
    assert count_active_parameters(model) / 1e9 == pytest.approx(billions, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traced_blocks_give_the_same_gradients(dtype: torch.dtype) -> None:
    results = []
    for traced in (False, True):
        model = decoder(experts={"number": 4, "balance_weight": 0.5}).train().compute_in(dtype)
        for block in model.blocks if traced else ():
            block.compile(backend="aot_eager")
        model(random_tokens(2, 24)).float().square().mean().backward()
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"number": "4", "active": "5"}, r"active \(5\) must be at most number \(4\)"),
        ({"number": "1"}, r"model\.experts\.number: .* greater than 1"),
        ({"active": "2"}, r"model\.experts\.number: is required"),
        ({"number": "4", "every": "9"}, r"experts\.every \(9\) is more than layers \(4\)"),
        ({"number": "4", "hidden": "20"}, r"experts\.hidden \(20\) must be a multiple of 8"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, str], message: str) -> None:
    flags = {f"model.experts.{k}": (f"--model.experts.{k}", v) for k, v in settings.items()}
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(overrides=flags)
    assert "\n" not in str(caught.value)


def test_dense_models_have_no_width_to_obey() -> None:
    assert Model(dim=12, hidden=5, heads=2).experts is None
