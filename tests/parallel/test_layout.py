"""Layouts: which rank is where, and which layouts are refused, with what words."""

from __future__ import annotations

import pytest

from dtt.config.model import Model
from dtt.config.parallel import Parallel
from dtt.errors import ConfigError
from dtt.parallel.layout import Layout, resolve


def test_left_alone_every_rank_is_a_replica() -> None:
    assert resolve(Parallel(), Model(), 8) == Layout(replicate=8)
    assert resolve(Parallel(), Model(), 1) == Layout()


@pytest.mark.parametrize(
    ("settings", "ranks", "layout"),
    [
        ({"shard": -1}, 8, Layout(shard=8)),
        ({"shard": 4}, 8, Layout(replicate=2, shard=4)),
        ({"replicate": 2, "shard": -1}, 8, Layout(replicate=2, shard=4)),
        ({"replicate": 2, "shard": 4}, 8, Layout(replicate=2, shard=4)),
    ],
)
def test_an_axis_takes_what_is_left(settings: dict[str, int], ranks: int, layout: Layout) -> None:
    assert resolve(Parallel(**settings), Model(), ranks) == layout
    assert layout.ranks == ranks


@pytest.mark.parametrize(
    ("settings", "ranks", "said"),
    [
        ({"shard": 3}, 8, "shard 3 does not divide the 8 ranks"),
        ({"replicate": 2, "shard": 2}, 8, "replicate 2 x shard 2 is 4 ranks, and there are 8"),
        ({"replicate": 1}, 2, "one rank is 1 ranks, and there are 2"),
        ({"replicate": 3, "shard": -1}, 4, "replicate 3 does not divide the 4 ranks"),
    ],
)
def test_what_does_not_multiply_is_refused(settings: dict[str, int], ranks: int, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(Parallel(**settings), Model(), ranks)
    assert said in error.value.what and error.value.fix


@pytest.mark.parametrize("settings", [{"shard": -1, "replicate": -1}, {"shard": 0}, {"shard": -2}])
def test_settings_without_a_meaning_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        Parallel(**settings)


def test_a_layout_says_its_axes() -> None:
    assert str(Layout(2, 4)) == "replicate 2 x shard 4" and str(Layout()) == "one rank"
