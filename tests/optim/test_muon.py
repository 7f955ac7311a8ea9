"""Muon against torch's, and Newton-Schulz against the singular value decomposition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from dtt.optim import muon
from dtt.optim.muon import Muon, zeropower

SHAPES = [(32, 32), (32, 32), (96, 32), (32, 96), (32, 32), (96, 32)]


def make(shapes: Sequence[tuple[int, ...]], seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def fill_gradients(parameters: list[Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(24, 24), (48, 24), (24, 48), (3, 48, 24), (2, 3, 24, 24)])
@pytest.mark.parametrize("steps", [1, 5])
def test_zeropower_maps_the_singular_values_by_the_quintic(
    shape: tuple[int, ...], steps: int
) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = left @ torch.diag_embed(values) @ right
    found = zeropower(update, steps)
    assert found.shape == update.shape and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.02)


def test_zeropower_is_nearly_orthogonal() -> None:
    update = torch.randn(24, 96, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(zeropower(update).float())
    assert float(values.min()) > 0.65 and float(values.max()) < 1.25


def test_zeropower_ignores_the_scale_and_bears_zeros() -> None:
    update = torch.randn(16, 16, generator=torch.Generator().manual_seed(4))
    assert torch.equal(zeropower(update), zeropower(update * 2.0**40))
    batch = torch.stack([update, torch.zeros(16, 16)])
    assert torch.equal(zeropower(batch)[1], torch.zeros(16, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("momentum", [0.95, 0.0])
def test_steps_are_torchs(momentum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"lr": 2e-2, "weight_decay": 0.1, "momentum": momentum}
    for limit in (2**24, 5000, 0):  # all in one batch, a few at a time, one by one
        monkeypatch.setattr(muon, "BATCH_ELEMENTS", limit)
        ours, theirs = make(SHAPES), make(SHAPES)
        optimizer = Muon(ours, **settings)
        reference = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
        start = [p.detach().clone() for p in theirs]
        for step in range(20):
            fill_gradients(ours, step)
            fill_gradients(theirs, step)
            optimizer.step()
            reference.step()  # type: ignore[no-untyped-call]
        for mine, other, before in zip(ours, theirs, start, strict=True):
            # bfloat16 has 8 bits: sums in another order differ by about 1 in 256.
            assert difference(mine, other) < 0.01 * difference(other, before)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().norm())


def test_update_has_the_rms_of_adamw() -> None:
    for shape in [(64, 64), (192, 64), (64, 192)]:
        (parameter,) = make([shape])
        before = parameter.detach().clone()
        fill_gradients([parameter], 0)
        Muon([parameter], lr=1.0, weight_decay=0.0).step()
        rms = float((parameter - before).detach().square().mean().sqrt())
        assert rms == pytest.approx(0.2, rel=0.2)


def test_stack_is_updated_as_its_matrices() -> None:
    (stack,) = make([(3, 40, 24)])
    singles = [Parameter(matrix.clone()) for matrix in stack.detach()]
    optimizers = Muon([stack], lr=0.02), Muon(singles, lr=0.02)
    for step in range(5):
        fill_gradients([stack], step)
        assert stack.grad is not None
        for single, gradient in zip(singles, stack.grad, strict=True):
            single.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(stack.detach(), torch.stack([p.detach() for p in singles]))


def test_gradients_are_left_as_they_are_and_absent_ones_skip() -> None:
    used, unused = make([(16, 16), (16, 16)])
    before = unused.detach().clone()
    fill_gradients([used], 0)
    assert used.grad is not None
    gradient = used.grad.clone()
    optimizer = Muon([used, unused], lr=0.02)
    optimizer.step()
    assert torch.equal(used.grad, gradient)
    assert torch.equal(unused, before) and unused not in optimizer.state


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="matrices"):
        Muon(make([(16,)]), lr=0.1)
