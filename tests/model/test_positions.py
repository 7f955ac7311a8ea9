"""Rotary positions: their formulae, and what they promise."""

from __future__ import annotations

import math

import pytest
import torch

from dtt.config.model import Rotary
from dtt.model.positions import frequencies, rotate, rotation_table

WIDTH = 16


def test_plain_frequencies() -> None:
    found, factor = frequencies(Rotary(theta=500.0), WIDTH)
    exact = [500.0 ** (-2 * i / WIDTH) for i in range(WIDTH // 2)]
    assert found.tolist() == pytest.approx(exact, rel=1e-12) and factor == 1


def test_linear_scaling_divides_every_frequency() -> None:
    found, factor = frequencies(Rotary(scaling="linear", factor=4), WIDTH)
    assert found.tolist() == pytest.approx((frequencies(Rotary(), WIDTH)[0] / 4).tolist())
    assert factor == 1


def test_ntk_keeps_the_highest_frequency_and_stretches_the_lowest_in_full() -> None:
    before, (found, factor) = (
        frequencies(Rotary(), WIDTH)[0],
        frequencies(Rotary(scaling="ntk", factor=4), WIDTH),
    )
    ratio = before / found
    assert float(ratio[0]) == 1 and float(ratio[-1]) == pytest.approx(4)
    assert (ratio.diff() > 0).all() and factor == 1


def test_llama3_leaves_short_waves_and_stretches_long_ones() -> None:
    settings = Rotary(scaling="llama3", factor=8, original_context=1024)
    before, (found, factor) = frequencies(Rotary(), WIDTH)[0], frequencies(settings, WIDTH)
    waves = 2 * math.pi / before
    short, long = waves < 1024 / 4, waves > 1024 / 1
    assert short.any() and long.any() and not (short | long).all()
    assert torch.equal(found[short], before[short])
    torch.testing.assert_close(found[long], before[long] / 8)
    between = (before / found)[~(short | long)]
    assert ((between > 1) & (between < 8)).all() and factor == 1


def test_yarn_leaves_fast_turns_stretches_slow_ones_and_sharpens() -> None:
    settings = Rotary(scaling="yarn", factor=8, original_context=1024)
    before, (found, factor) = frequencies(Rotary(), WIDTH)[0], frequencies(settings, WIDTH)
    turns = 1024 * before / (2 * math.pi)
    fast, slow = turns > 32 * 10 ** (8 / WIDTH), turns < 0.1
    assert fast.any() and slow.any()
    assert torch.equal(found[fast], before[fast])
    torch.testing.assert_close(found[slow], before[slow] / 8)
    assert factor == pytest.approx(0.1 * math.log(8) + 1)
    assert rotation_table(settings, WIDTH, 4)[0, 0, 0] == pytest.approx(factor)


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn", "llama3"])
def test_a_factor_of_one_changes_nothing(scaling: str) -> None:
    settings = Rotary.model_validate({"scaling": scaling, "factor": 1.0})
    found, factor = frequencies(settings, WIDTH)
    torch.testing.assert_close(found, frequencies(Rotary(), WIDTH)[0])
    assert factor == 1


def test_rotation_is_multiplication_of_complex_pairs() -> None:
    table = rotation_table(Rotary(), WIDTH, 50)
    x = torch.randn(3, 50, WIDTH, generator=torch.Generator().manual_seed(0))
    angles = torch.outer(torch.arange(50).double(), frequencies(Rotary(), WIDTH)[0])
    turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones(()).double(), angles)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate(x, table).double(), expected, rtol=0, atol=1e-6)


def test_rotated_products_depend_on_the_distance_only() -> None:
    table = rotation_table(Rotary(), WIDTH, 4096)
    q, k = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    products = (rotate(q, table) * rotate(k, table[:, 5:6])).sum(-1)
    for shift in (1, 100, 4000):
        moved = (rotate(q, table[:, shift:]) * rotate(k, table[:, 5 + shift : 6 + shift])).sum(-1)
        torch.testing.assert_close(moved, products[: len(moved)], rtol=0, atol=1e-5)


def test_far_positions_are_as_exact_as_near_ones() -> None:
    """Angles in fp32 would be off by 1e-3 at position 100,000."""
    table = rotation_table(Rotary(), WIDTH, 100_001)
    expected = [math.cos(100_000 * f) for f in frequencies(Rotary(), WIDTH)[0].tolist()]
    assert table[0, -1].tolist() == pytest.approx(expected, abs=1e-7)
