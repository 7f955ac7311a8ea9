"""The built optimizers against torch's, bit for bit, on the same random problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dtt.config.optim import Adam, AdamW, Muon, Optimizer, Schedule, Sgd
from dtt.errors import CheckpointError, ConfigError
from dtt.optim.build import BUILDERS, Optimizers, build_optimizer, clip_gradients
from dtt.optim.muon import Muon as MuonOptimizer
from dtt.optim.schedule import learning_rate

SETTINGS: list[Optimizer] = [
    AdamW(lr=0.01),
    Adam(lr=0.01, weight_decay=0.02),
    Sgd(lr=0.1, weight_decay=0.01),
    Sgd(lr=0.1, nesterov=True),
    Sgd(lr=0.1, momentum=0.0),
    Muon(lr=0.01),
]
IDS = ["adamw", "adam", "sgd", "nesterov", "plain-sgd", "muon"]


class Net(nn.Module):
    """A language model in miniature: a tied embedding, two blocks with a norm and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(2)
        )
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.unused = Parameter(torch.ones(8, 8))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 + step)
        tokens = torch.randint(0, 11, (16,), generator=generator)
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return nn.functional.cross_entropy(self.head(hidden), tokens.roll(1))


def train(net: Net, optimizer: Any, steps: range, total: int = 24) -> None:
    schedule = Schedule(warmup_steps=4)
    for step in steps:
        factor = learning_rate(schedule, step, total)
        if isinstance(optimizer, Optimizers):
            optimizer.set_lr(factor)
        else:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        optimizer.zero_grad()
        net.loss(step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def build(settings: Optimizer, net: Net) -> Optimizers:
    return build_optimizer(settings, net.named_parameters(remove_duplicate=False))


def assert_equal(one: Net, other: Net) -> None:
    for (name, mine), (_, theirs) in zip(
        one.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name


def groups(net: Net, decay: float, lr: float) -> list[dict[str, Any]]:
    vectors = [p for n, p in net.named_parameters() if n.endswith("bias") or ".0.weight" in n]
    matrices = [p for p in net.parameters() if all(p is not v for v in vectors)]
    return [
        {"params": matrices, "weight_decay": decay, "peak": lr},
        {"params": vectors, "weight_decay": 0.0, "peak": lr},
    ]


REFERENCES: dict[str, Callable[[Net], torch.optim.Optimizer]] = {
    "adamw": lambda net: torch.optim.AdamW(
        groups(net, 0.1, 0.01), lr=0.01, betas=(0.9, 0.95), fused=True
    ),
    "adam": lambda net: torch.optim.Adam(
        groups(net, 0.02, 0.01), lr=0.01, betas=(0.9, 0.95), fused=True
    ),
    "sgd": lambda net: torch.optim.SGD(groups(net, 0.01, 0.1), lr=0.1, momentum=0.9, fused=True),
    "nesterov": lambda net: torch.optim.SGD(
        groups(net, 0.0, 0.1), lr=0.1, momentum=0.9, nesterov=True, fused=True
    ),
    "plain-sgd": lambda net: torch.optim.SGD(groups(net, 0.0, 0.1), lr=0.1, fused=True),
}


@pytest.mark.parametrize(("settings", "name"), list(zip(SETTINGS[:-1], IDS[:-1], strict=True)))
def test_steps_are_torchs(settings: Optimizer, name: str) -> None:
    ours, theirs = Net(), Net()
    train(ours, build(settings, ours), range(24))
    train(theirs, REFERENCES[name](theirs), range(24))
    assert_equal(ours, theirs)
    assert not torch.equal(ours.embed.weight, Net().embed.weight)


def test_muon_takes_stacks_of_experts_and_adamw_their_router() -> None:
    shapes = {"router.weight": (4, 8), "up": (4, 16, 8), "down": (4, 8, 16), "norm": (8,)}
    named = [(f"blocks.0.mlp.{n}", torch.nn.Parameter(torch.ones(s))) for n, s in shapes.items()]
    muon, adamw = build_optimizer(Muon(), named).parts
    taken = [group["param_names"] for part in (muon, adamw) for group in part.param_groups]
    assert taken == [
        ["blocks.0.mlp.up", "blocks.0.mlp.down"],
        ["blocks.0.mlp.router.weight"],
        ["blocks.0.mlp.norm"],
    ]


def test_muon_takes_the_matrices_in_blocks_and_adamw_the_rest() -> None:
    ours, theirs = Net(), Net()
    optimizer = build(Muon(lr=0.01), ours)
    muon, adamw = optimizer.parts
    assert isinstance(muon, MuonOptimizer) and isinstance(adamw, torch.optim.AdamW)
    matrices = ["blocks.0.1.weight", "blocks.1.1.weight"]
    assert muon.param_groups[0]["param_names"] == matrices

    # The two side by side, as one would write it by hand.
    inside = [p for n, p in theirs.named_parameters() if n in matrices]
    outside = groups(theirs, 0.1, 0.01)
    outside[0]["params"] = [p for p in outside[0]["params"] if all(p is not q for q in inside)]
    apart = [MuonOptimizer(inside, lr=0.01), torch.optim.AdamW(outside, betas=(0.9, 0.95))]
    for step in range(24):
        for part in apart:
            for group in part.param_groups:
                group["lr"] = 0.01 * learning_rate(Schedule(warmup_steps=4), step, 24)
            part.zero_grad()
        theirs.loss(step).backward()  # type: ignore[no-untyped-call]
        for part in apart:
            part.step()
    train(ours, optimizer, range(24))
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_only_matrices_decay_and_a_tied_parameter_counts_once(settings: Optimizer) -> None:
    net = Net()
    settings = settings.model_copy(update={"weight_decay": 0.3})
    optimizer = build(settings, net)
    decays = {
        name: group["weight_decay"]
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in net.named_parameters())
    assert "embed.weight" in names and "head.weight" not in names
    for name, decay in decays.items():
        assert decay == (0.3 if net.get_parameter(name).ndim == 2 else 0.0), name


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_loaded_state_continues_bitwise(settings: Optimizer) -> None:
    whole = Net()
    train(whole, build(settings, whole), range(24))

    first = Net()
    stopped = build(settings, first)
    train(first, stopped, range(11))
    state = {name: tensor.clone() for name, tensor in stopped.named_state().items()}
    saved = {name: tensor.clone() for name, tensor in state.items()}
    second = Net()
    second.load_state_dict(first.state_dict())
    resumed = build(settings, second)
    resumed.load_named_state(state)
    loaded = resumed.named_state()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in saved.items())
    train(second, resumed, range(11, 24))
    assert_equal(second, whole)


def test_state_names_and_the_parameter_without_gradient() -> None:
    net = Net()
    optimizer = build(Muon(), net)
    assert optimizer.named_state() == {}
    train(net, optimizer, range(3))
    state = optimizer.named_state()
    assert state["blocks.0.1.weight.momentum_buffer"].shape == (8, 8)
    assert state["embed.weight.step"].shape == () and float(state["embed.weight.step"]) == 3
    assert not any(name.startswith(("head.", "unused")) for name in state)
    assert torch.equal(net.unused, Net().unused)


def test_frozen_parameters_are_left_out() -> None:
    net = Net()
    net.embed.weight.requires_grad_(False)
    optimizer = build(AdamW(), net)
    assert all("embed.weight" not in group["param_names"] for group in optimizer.param_groups)


def spoilt(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    if how == "missing":
        return {n: t for n, t in state.items() if n != "embed.weight.exp_avg"}
    if how == "shape":
        return state | {"embed.weight.exp_avg": torch.zeros(8, 11)}
    if how == "parameter":
        return state | {"other.weight.step": torch.tensor(1.0)}
    return {"embed.weight.momentum_buffer": torch.zeros(11, 8)}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "exp_avg_sq, step for 'embed.weight'"),
        ("shape", r"\(8, 11\).*embed.weight.exp_avg.*\(11, 8\)"),
        ("parameter", "other.weight"),
        ("optimizer", "AdamW keeps exp_avg, exp_avg_sq, step"),
    ],
)
def test_foreign_state_is_refused_and_changes_nothing(how: str, message: str) -> None:
    net = Net()
    optimizer = build(AdamW(), net)
    train(net, optimizer, range(3))
    before = {name: tensor.clone() for name, tensor in optimizer.named_state().items()}
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_named_state(spoilt(before, how))
    after = optimizer.named_state()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_set_lr_reaches_every_group_and_nothing_else(settings: Optimizer) -> None:
    optimizer = build(settings, Net())
    before = [{k: v for k, v in g.items() if k != "lr"} for g in optimizer.param_groups]
    assert all(group["lr"] == settings.lr for group in optimizer.param_groups)
    optimizer.set_lr(0.25)
    optimizer.set_lr(0.5)  # of the peak, not of the rate before
    assert all(group["lr"] == settings.lr * 0.5 for group in optimizer.param_groups)
    after = [{k: v for k, v in g.items() if k != "lr"} for g in optimizer.param_groups]
    assert [g.get("betas") for g in after] == [g.get("betas") for g in before]


def test_every_optimizer_of_the_schema_can_be_built() -> None:
    assert set(BUILDERS) == {type(settings).model_fields["name"].default for settings in SETTINGS}


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(ConfigError, match="nesterov"):
        build(Sgd(nesterov=True, momentum=0), Net())


def test_gradient_scaler_drives_it() -> None:
    plain, scaled = Net(), Net()
    train(plain, build(AdamW(), plain), range(1))
    optimizer = build(AdamW(), scaled)
    optimizer.set_lr(learning_rate(Schedule(warmup_steps=4), 0, 24))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(scaled.loss(0)).backward()  # type: ignore[no-untyped-call]
    scaler.step(optimizer)  # type: ignore[arg-type]
    assert_equal(plain, scaled)
    scaled.embed.weight.grad = torch.full((11, 8), torch.inf)
    scaler.update()
    scaler.step(optimizer)  # type: ignore[arg-type]
    assert_equal(plain, scaled)


def gradients(scale: float) -> list[Parameter]:
    generator = torch.Generator().manual_seed(9)
    parameters = [Parameter(torch.zeros(shape)) for shape in [(7, 5), (5,), (3, 4)]]
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return [*parameters, Parameter(torch.zeros(2))]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 0.0, torch.inf, torch.nan])
def test_clipping_is_torchs(scale: float) -> None:
    ours, theirs = gradients(scale), gradients(scale)
    norm = clip_gradients(ours, 1.0)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert norm.shape == ()
    torch.testing.assert_close(norm, expected, rtol=0, atol=0, equal_nan=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0, equal_nan=True)


def test_no_limit_only_measures() -> None:
    parameters = gradients(1e3)
    norm = clip_gradients(parameters, None)
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    assert float(norm) == pytest.approx(float(flat.double().norm()), rel=1e-6)
    for mine, other in zip(parameters, gradients(1e3), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, other.grad)  # type: ignore[arg-type]
