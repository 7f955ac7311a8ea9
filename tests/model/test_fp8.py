"""Products in fp8 against those in fp32: the rounding of the format, and no more."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtt.config.model import Model
from dtt.errors import ConfigError
from dtt.model.decoder import Decoder
from dtt.model.fp8 import linear_fp8, refuse_without_fp8, use_fp8
from dtt.model.layers import Linear


def apart(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_products_and_gradients_are_within_the_rounding(bias: bool, scale: float) -> None:
    """e4m3 has 3 bits behind the first: each factor is off by up to 1/16, a sum by less."""
    draw = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(2, 32, 64, generator=draw)).requires_grad_()
    weight = torch.randn(48, 64, generator=draw).requires_grad_()
    offset = torch.randn(48, generator=draw).requires_grad_() if bias else None
    inputs = [t for t in (x, weight, offset) if t is not None]
    grad = scale * torch.randn(2, 32, 48, generator=draw)
    expected = F.linear(x, weight, offset)
    found = linear_fp8(x, weight, offset)
    assert found.shape == expected.shape and 0 < apart(found, expected) < 0.05
    gradients = zip(
        torch.autograd.grad(found, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    )
    assert all(apart(one, other) < 0.1 for one, other in gradients)


def test_what_fp8_holds_exactly_is_exact() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5, 448.0] * 4] * 16)
    assert torch.equal(linear_fp8(x, torch.eye(16), None), x)


def test_zeros_and_odd_rows() -> None:
    weight = torch.randn(16, 16)
    assert not linear_fp8(torch.zeros(16, 16), weight, None).any()
    x = torch.randn(3, 16)
    assert torch.equal(linear_fp8(x, weight, None), F.linear(x, weight))


def test_only_linear_maps_of_blocks_that_fit_use_it() -> None:
    model = Decoder(Model(dim=64, layers=2, heads=4, hidden=100, vocab_size=64))
    use_fp8(model.blocks)
    using = {n for n, m in model.named_modules() if isinstance(m, Linear) and _uses(m)}
    assert using == {f"blocks.{i}.attention.{n}" for i in range(2) for n in ("qkv", "out")}


def _uses(layer: Linear) -> bool:
    return layer.product is linear_fp8


def test_a_model_learns_with_it() -> None:
    """As well as without, for as long as the rounding is small beside the gradients."""
    found = []
    for fp8 in (False, True):
        model = Decoder(Model(dim=64, layers=2, heads=4, context=32, vocab_size=64))
        model.init_weights(0)
        if fp8:
            use_fp8(model.blocks)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        tokens = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(1))
        for _ in range(40):
            logits = model(tokens[:, :-1]).flatten(0, 1)
            loss = F.cross_entropy(logits, tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(loss.item())
    assert found[0] < 1.5 and found[1] == pytest.approx(found[0], rel=0.1)


def test_devices_without_it_are_refused() -> None:
    with pytest.raises(ConfigError, match="cpu does not multiply fp8"):
        refuse_without_fp8(torch.device("cpu"))
