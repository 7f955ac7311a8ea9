"""Layouts: which rank is where, and which layouts are refused, with what words."""

from __future__ import annotations

from typing import Any

import pytest

from dtt.config.model import Experts, Model
from dtt.config.parallel import AXES, Parallel
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


OTHER = "change one of the two"
FOUR = Experts(number=4)


@pytest.mark.parametrize(
    ("settings", "model", "what", "fix"),
    [
        ({"tensor": 3}, {}, "model.heads (4) is not divisible by parallel.tensor (3)", OTHER),
        (
            {"tensor": 4},
            {"kv_heads": 2},
            "model.kv_heads (2) is not divisible by parallel.tensor (4)",
            OTHER,
        ),
        (
            {"tensor": 4},
            {"hidden": 510},
            "the width of the MLP (510) is not divisible by parallel.tensor (4)",
            OTHER,
        ),
        (
            {"tensor": 16},
            {"hidden": 504, "heads": 16, "experts": Experts(number=4, every=2)},
            "the width of the MLP (504) is not divisible by parallel.tensor (16)",
            "the layout is tensor 16",
        ),
        (
            {"context": 2},
            {"context": 286},
            "model.context (286) is not divisible by 2 x parallel.context x parallel.tensor (4)",
            "the layout is context 2: change",
        ),
        (
            {"tensor": 2},
            {"context": 287},
            "model.context (287) is not divisible by 2 x parallel.context x parallel.tensor (2)",
            OTHER,
        ),
        (
            {"context": 2, "tensor": 4},
            {"context": 296},
            "model.context (296) is not divisible by 2 x parallel.context x parallel.tensor (16)",
            "the layout is context 2 x tensor 4: change",
        ),
        (
            {"pipeline": 3},
            {},
            "model.layers (4) is not divisible by the pipeline's stages (3)",
            "the layout is pipeline 3: change",
        ),
        (
            {"pipeline": 2, "schedule": "interleaved"},
            {"layers": 6},
            "model.layers (6) is not divisible by the pipeline's stages (4)",
            OTHER,
        ),
        (
            {"pipeline": 2, "schedule": "zero-bubble"},
            {"layers": 2},
            "model.layers (2) is not divisible by the pipeline's stages (4)",
            OTHER,
        ),
        (
            {"expert": 3},
            {"experts": FOUR},
            "model.experts.number (4) is not divisible by parallel.expert (3)",
            OTHER,
        ),
        (
            {"expert": 2},
            {},
            "parallel.expert is 2, and the model has no experts",
            "set model.experts, or parallel.expert to 1",
        ),
        (
            {"pipeline": 2},
            {"tied_head": True},
            "model.tied_head: a pipeline parts the embedding from the head",
            "set model.tied_head to false, or parallel.pipeline to 1",
        ),
    ],
)
def test_a_model_that_cannot_be_divided_so_is_refused(
    settings: dict[str, Any], model: dict[str, Any], what: str, fix: str
) -> None:
    wanted = Parallel(**settings)
    ranks = wanted.tensor * wanted.context * wanted.pipeline * wanted.expert
    with pytest.raises(ConfigError) as error:
        resolve(wanted, Model(**model), ranks)
    assert what in error.value.what and fix in error.value.fix
    assert "\n" not in str(error.value) and error.value.exit_code == 2


@pytest.mark.parametrize(
    ("settings", "model"),
    [
        ({"tensor": 4}, {"kv_heads": 4, "hidden": 512}),
        ({"tensor": 4}, {"hidden": 504, "heads": 8, "experts": FOUR}),  # no dense MLP in it
        ({"context": 2}, {"context": 284}),
        ({"shard": 3}, {"context": 287, "layers": 5, "heads": 2}),
        ({"schedule": "interleaved"}, {"layers": 3, "tied_head": True}),  # without a pipeline
        ({"pipeline": 2, "schedule": "1f1b"}, {"layers": 6}),
        ({"expert": 4}, {"experts": FOUR}),
    ],
)
def test_a_model_that_can_be_divided_so_is_not(
    settings: dict[str, Any], model: dict[str, Any]
) -> None:
    sizes = {name: size for name, size in settings.items() if name in AXES}
    layout = Layout(**sizes)
    assert resolve(Parallel(**settings), Model(**model), layout.ranks) == layout


TABLES = {
    Layout(pipeline=2, shard=2, tensor=2): """
        rank pipeline shard tensor data
        0    0        0     0      0
        1    0        0     1      0
        2    0        1     0      1
        3    0        1     1      1
        4    1        0     0      0
        5    1        0     1      0
        6    1        1     0      1
        7    1        1     1      1""",
    Layout(expert=2, context=3, shard=2): """
        rank expert context shard data
        0    0      0       0     0
        1    0      0       1     1
        2    0      1       0     0
        3    0      1       1     1
        4    0      2       0     0
        5    0      2       1     1
        6    1      0       0     2
        7    1      0       1     3
        8    1      1       0     2
        9    1      1       1     3
        10   1      2       0     2
        11   1      2       1     3""",
    Layout(replicate=2, shard=3, tensor=2): """
        rank replicate shard tensor data
        0    0         0     0      0
        1    0         0     1      0
        2    0         1     0      1
        3    0         1     1      1
        4    0         2     0      2
        5    0         2     1      2
        6    1         0     0      3
        7    1         0     1      3
        8    1         1     0      4
        9    1         1     1      4
        10   1         2     0      5
        11   1         2     1      5""",
}


@pytest.mark.parametrize("layout", list(TABLES), ids=str)
def test_a_rank_is_where_the_table_says(layout: Layout) -> None:
    head, *lines = (line.split() for line in TABLES[layout].strip().splitlines())
    assert layout.ranks == len(lines)
    for line in lines:
        said = dict(zip(head, map(int, line), strict=True))
        rank, data = said.pop("rank"), said.pop("data")
        assert layout.coordinates(rank) == dict.fromkeys(AXES, 0) | said
        assert layout.data_rank(rank) == data < layout.data


@pytest.mark.parametrize("axis", ["replicate", "shard", "tensor", "context"])
def test_zero_bubble_goes_alone(axis: str) -> None:
    """PyTorch's split backward passes lose gradients beside FSDP2."""
    settings = Parallel(pipeline=2, schedule="zero-bubble", **{axis: 2})
    with pytest.raises(ConfigError, match=r"goes with a pipeline alone, not with .*2"):
        resolve(settings, Model(), 4)
    assert resolve(Parallel(pipeline=2, schedule="zero-bubble"), Model(), 2).pipeline == 2
