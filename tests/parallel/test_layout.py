"""Layouts: which rank is where, and which layouts are refused, with what words."""

from __future__ import annotations

import pytest

from dtt.config.model import Model
from dtt.config.parallel import AXES, Parallel
from dtt.errors import ConfigError
from dtt.parallel.layout import Layout, refuse_misfit, resolve


def test_left_alone_every_rank_is_a_replica() -> None:
    assert resolve(Parallel(), 8) == Layout(replicate=8)
    assert resolve(Parallel(), 8).only_replicates
    assert resolve(Parallel(), 1) == Layout()


@pytest.mark.parametrize(
    ("settings", "ranks", "layout"),
    [
        ({"shard": -1}, 8, Layout(shard=8)),
        ({"shard": 4}, 8, Layout(replicate=2, shard=4)),
        ({"replicate": 2, "shard": -1}, 8, Layout(replicate=2, shard=4)),
        ({"tensor": 2, "pipeline": 2}, 8, Layout(pipeline=2, replicate=2, tensor=2)),
        ({"tensor": -1}, 4, Layout(tensor=4)),
    ],
)
def test_an_axis_takes_what_is_left(settings: dict[str, int], ranks: int, layout: Layout) -> None:
    assert resolve(Parallel(**settings), ranks) == layout
    assert layout.ranks == ranks


@pytest.mark.parametrize(
    ("settings", "ranks", "said"),
    [
        ({"shard": 3}, 8, "shard 3 = 3 does not divide the 8 ranks"),
        ({"replicate": 2, "shard": 2}, 8, "replicate 2 x shard 2 makes 4 ranks, and there are 8"),
        ({"replicate": 1}, 2, "every axis 1 makes 1 ranks, and there are 2"),
        ({"tensor": 2, "shard": -1}, 3, "tensor 2 = 2 does not divide the 3 ranks"),
    ],
)
def test_what_does_not_multiply_is_refused(settings: dict[str, int], ranks: int, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(Parallel(**settings), ranks)
    assert said in error.value.what and error.value.fix


@pytest.mark.parametrize("settings", [{"shard": -1, "tensor": -1}, {"shard": 0}, {"tensor": -2}])
def test_settings_without_a_meaning_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        Parallel(**settings)


def test_ranks_are_numbered_with_the_tensor_axis_innermost() -> None:
    layout = Layout(pipeline=2, replicate=2, shard=3, tensor=2)
    seen = [tuple(layout.place(rank)[name] for name in AXES) for rank in range(layout.ranks)]
    assert seen == sorted(seen) and len(set(seen)) == layout.ranks
    assert layout.place(1)["tensor"] == 1 and layout.place(2)["shard"] == 1


def test_ranks_that_share_a_sequence_have_one_data_rank() -> None:
    layout = Layout(pipeline=2, replicate=2, shard=2, context=2, tensor=2)
    groups: dict[int, int] = {}
    for rank in range(layout.ranks):
        groups[layout.data_rank(rank)] = groups.get(layout.data_rank(rank), 0) + 1
    assert groups == dict.fromkeys(range(layout.data_ranks), 8)


MODEL = Model(dim=64, heads=4, kv_heads=2, layers=6, context=96)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Layout(tensor=3), "model.heads (4) is not divisible by parallel: tensor 3"),
        (Layout(tensor=4), "model.kv_heads (2) is not divisible by parallel: tensor 4"),
        (Layout(pipeline=4), "model.layers (6) is not divisible by parallel: pipeline 4"),
        (Layout(context=5), "model.context (96) is not divisible by parallel: 2 x context 5"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(layout: Layout, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        refuse_misfit(layout, MODEL)
    assert said in error.value.what


def test_a_tied_head_is_not_parted() -> None:
    refuse_misfit(Layout(pipeline=2, tensor=2, context=2), MODEL)
    tied = MODEL.model_copy(update={"tied_head": True})
    refuse_misfit(Layout(tensor=2), tied)
    with pytest.raises(ConfigError, match="one matrix"):
        refuse_misfit(Layout(pipeline=2), tied)
