"""Dropout: its arithmetic by hand, its statistics, and that no division of the work shows in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_decoder import decoder, random_tokens
from torch import Tensor

from dtt.data import order
from dtt.model.attention import attend, document_mask
from dtt.model.blocked_attention import BLOCK
from dtt.model.dropout import (
    AttentionDropout,
    BlockDropout,
    Dropout,
    Randomness,
    drop,
    kept,
    sample_keys,
)
from dtt.model.recompute import Recompute

CPU = torch.device("cpu")
RATES = [0.01, 0.1, 0.5, 0.9]
LAYERS, WIDTH, HEADS = 2, 24, 4


def randomness(rate: float = 0.3, seed: int = 1, samples: range = range(4)) -> Randomness:
    made = Randomness(rate, LAYERS)
    made.keys = sample_keys(seed, samples, CPU)
    return made


def stays(dropout: Dropout | AttentionDropout | None, width: int = WIDTH) -> Tensor:
    """Which activations [B, T, width] stay; of weights [B, heads, Q, T]."""
    assert dropout is not None
    if isinstance(dropout, AttentionDropout):
        return kept(dropout.query_keys(HEADS), width, dropout.rate)
    return drop(torch.ones(len(dropout.keys), len(dropout.columns), width), dropout) != 0


def masks(given: Randomness, batch: int, length: int) -> list[Tensor]:
    """What stays at every place, in the order of their numbers."""
    first, blocks = given.dropouts(batch, length)
    each = [stays(d) for b in blocks for d in (b.weights, b.attention, b.mlp)]
    return [stays(first), *each]


def hash_by_hand(key: int, element: int) -> int:
    """What is compared with 2^32 times the rate, in integers that have no width."""
    ones = 2**32 - 1
    state = (key ^ element * 0x9E3779B9) & ones
    state = state * 0x7FEB352D & ones
    state = (state ^ state >> 15) + (key >> 32) & ones
    return (state * 0x846CA68B + 2**31) & ones


@pytest.mark.parametrize("step", range(4))
def test_masks_by_hand(step: int) -> None:
    """Keys against the hash of the order of samples, elements against Python's integers."""
    seed = order.mix(9, 3, step)
    _, blocks = randomness(0.3, seed, range(6, 8)).dropouts(2, 3)
    outputs, weights = stays(blocks[1].mlp), stays(blocks[1].weights)
    for row, sample in enumerate((6, 7)):
        for column in range(3):
            key = order.mix(9, 3, step, sample, 1 + 3 * 1 + 2, column)
            expected = [hash_by_hand(key, f) >= round(0.3 * 2**32) for f in range(WIDTH)]
            assert outputs[row, column].tolist() == expected
            for head in range(HEADS):
                key = order.mix(9, 3, step, sample, 1 + 3 * 1, head, column)
                expected = [hash_by_hand(key, k) >= round(0.3 * 2**32) for k in range(WIDTH)]
                assert weights[row, head, column].tolist() == expected


def cells(rate: float) -> Tensor:
    """What stays of [steps, places, samples, columns, features]."""
    found = []
    for step in range(4):
        first, blocks = randomness(rate, order.mix(0, 3, step), range(16)).dropouts(16, 32)
        outputs = [first, *(d for b in blocks for d in (b.attention, b.mlp))]
        found.append(torch.stack([stays(d, 128) for d in outputs]))
    return torch.stack(found)


def weight_cells(rate: float) -> Tensor:
    """What stays of [steps, samples, heads, queries, keys]."""
    found = []
    for step in range(4):
        _, blocks = randomness(rate, order.mix(0, 3, step), range(16)).dropouts(16, 64)
        found.append(stays(blocks[0].weights, 64))
    return torch.stack(found)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("made", [cells, weight_cells])
def test_elements_are_dropped_at_the_rate_and_independent(
    made: Callable[[float], Tensor], rate: float
) -> None:
    """Means, and correlations at every distance along every coordinate, in standard errors."""
    centred = (made(rate).float() - (1 - rate)) / math.sqrt(rate * (1 - rate))
    errors = [centred.mean() * math.sqrt(centred.numel())]
    for dim, size in enumerate(centred.shape):
        for lag in range(1, size):
            products = centred.narrow(dim, 0, size - lag) * centred.narrow(dim, lag, size - lag)
            errors.append(products.mean() * math.sqrt(products.numel()))
    found = torch.stack(errors)
    # Of 150 to 200 normal variables the largest is below 4.5 in 99.9% of the cases.
    assert float(found.abs().max()) < 4.5
    assert 0.8 < float(found.square().mean().sqrt()) < 1.2


@pytest.mark.parametrize("made", [cells, weight_cells])
def test_no_row_and_no_column_is_dropped_more_than_others(made: Callable[[float], Tensor]) -> None:
    """Chi-square of the counts along each subset of the coordinates that leaves one out."""
    centred = (made(0.1).float() - 0.9) / 0.3
    for dim, size in enumerate(centred.shape):
        sums = centred.sum(dim) / math.sqrt(size)
        degrees = sums.numel()
        # The fourth moment of a cell is 8.1 at this rate, that of a sum of them tends to 3.
        spread = math.sqrt(degrees * (2 + 5.1 / size))
        assert abs(float(sums.square().sum()) - degrees) < 4.5 * spread


def test_masks_are_a_function_of_seed_sample_place_and_column() -> None:
    given = masks(randomness(), 4, 8)
    torch.rand(3)  # what is drawn elsewhere does not matter
    again = masks(randomness(), 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True))
    other = masks(randomness(seed=2), 4, 8)
    assert not any(torch.equal(a, b) for a, b in zip(given, other, strict=True))
    few, short = masks(randomness(samples=range(1, 3)), 2, 8), masks(randomness(), 4, 5)
    for whole, rows, columns in zip(given, few, short, strict=True):
        assert torch.equal(rows, whole[1:3])
        assert torch.equal(columns, whole.narrow(-2, 0, 5))
    equal = [torch.equal(a, b) for i, a in enumerate(given[2:]) for b in given[2 + i + 1 :]]
    assert not any(equal)


def test_a_forward_keeps_its_key() -> None:
    """What was taken for one forward holds in its backward pass, after the next one's key."""
    given = randomness()
    first, _ = given.dropouts(4, 8)
    before = stays(first)
    given.keys = sample_keys(2, range(4), CPU)
    assert torch.equal(stays(first), before)
    assert not torch.equal(stays(given.dropouts(4, 8)[0]), before)


def test_part_of_the_columns_and_of_the_heads_have_the_masks_of_the_whole() -> None:
    whole, part = randomness(), randomness()
    part.columns, part.attention_columns = torch.tensor([1, 6]), torch.tensor([0, 3, 7])
    part.first_head = 1
    first, blocks = whole.dropouts(4, 8)
    part_first, part_blocks = part.dropouts(4, 2)
    pairs = [(part_first, first)]
    for mine, all_ in zip(part_blocks, blocks, strict=True):
        assert mine.weights is not None and all_.weights is not None
        pairs += [(mine.attention, all_.attention), (mine.mlp, all_.mlp)]
        expected = kept(all_.weights.query_keys(4), 8, 0.3)[:, 1:3, [0, 3, 7]]
        assert torch.equal(kept(mine.weights.query_keys(2), 8, 0.3), expected)
        # As where a rank's queries are in two pieces.
        piece = replace(mine.weights, columns=mine.weights.columns[1:])
        assert torch.equal(kept(piece.query_keys(2), 8, 0.3), expected[:, :, 1:])
    for mine, all_ in pairs:
        assert torch.equal(stays(mine), stays(all_)[:, [1, 6]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", RATES)
def test_values_and_gradients_are_those_of_an_explicit_mask(
    dtype: torch.dtype, rate: float
) -> None:
    dropout, _ = randomness(rate).dropouts(4, 8)
    draw = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(4, 8, WIDTH, generator=draw).to(dtype) for _ in range(2))
    x.requires_grad_()
    y = drop(x, dropout)
    (found,) = torch.autograd.grad(y, x, grad)
    scale = stays(dropout).double() / (1 - rate)
    assert y.dtype == found.dtype == dtype
    # One rounding to the type's bits.
    limit = {"rtol": torch.finfo(dtype).eps, "atol": 0.0}
    torch.testing.assert_close(y.double(), x.double() * scale, **limit)
    torch.testing.assert_close(found.double(), grad.double() * scale, **limit)


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, dropout: AttentionDropout
) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(~seen, -math.inf)
    stay = kept(dropout.query_keys(q.shape[1]), k.shape[2], dropout.rate)
    return torch.softmax(scores, -1) * stay / (1 - dropout.rate) @ v


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize(("queries", "length"), [(1, 1), (7, 7), (5, 9), (BLOCK + 9, BLOCK + 9)])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_dropped_attention_is_that_of_an_explicit_mask(
    dtype: torch.dtype,
    limit: float,
    queries: int,
    length: int,
    heads: int,
    kv_heads: int,
    documents: bool,
) -> None:
    """Output and gradients, against softmax, mask and product in fp64."""
    draw = torch.Generator().manual_seed(length)
    q, grad = (torch.randn(3, heads, queries, 16, generator=draw) for _ in range(2))
    k, v = (torch.randn(3, kv_heads, length, 16, generator=draw) for _ in range(2))
    places = torch.arange(length).repeat(3, 1)
    if documents:
        places[1, length // 2 :] -= length // 2
    seen = document_mask(places, None)[:, :, length - queries :]
    given = randomness(samples=range(3))
    given.attention_columns = torch.arange(length - queries, length)
    dropout = given.dropouts(3, length)[1][1].weights
    assert dropout is not None
    results = []
    for kind in (dtype, torch.float64):
        inputs = [x.bfloat16().to(kind).requires_grad_() for x in (q, k, v)]
        if kind is dtype and not results:
            y = attend(*inputs, seen if documents else None, dropout)
        else:
            y = explicit_attention(*inputs, seen, dropout)
        gradients = torch.autograd.grad(y, inputs, grad.bfloat16().to(kind))
        results.append([x.detach().double() for x in (y, *gradients)])
    for found, expected in zip(*results, strict=True):
        # The first query's gradient is zero: it sees one key.
        assert float((found - expected).norm()) <= limit * float(expected.norm()) + 1e-6 * limit


@pytest.mark.parametrize("recompute", [False, True])
def test_parts_of_a_model_drop_what_the_whole_drops(recompute: bool) -> None:
    """A model whose blocks are apart, and whose rows come in two forwards."""

    def model() -> torch.nn.Module:
        return decoder(dropout=0.3, layers=3).train()

    tokens, whole = random_tokens(4, 24), model()
    whole.randomness.keys = sample_keys(7, range(4), CPU)
    expected = whole.hidden(tokens)
    first = model().keep_part(range(1), first=True, last=False)
    last = model().keep_part(range(1, 3), first=False, last=True)
    found = []
    for rows in (range(2), range(2, 4)):
        for part in (first, last):
            part.recompute = Recompute() if recompute else None
            part.randomness.keys = sample_keys(7, rows, CPU)
        found.append(last.hidden(first.hidden(tokens[rows.start : rows.stop])))
    torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=1e-5)
    torch.cat(found).sum().backward()  # both forwards before a backward, as in a pipeline
    expected.sum().backward()
    for part in (first, last):
        for name, parameter in part.named_parameters():
            theirs = whole.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, theirs, rtol=1e-4, atol=1e-4)


def test_without_dropout_there_is_nothing() -> None:
    model, x = decoder(dropout=0.0).train(), torch.ones(2, 3, 4)
    assert drop(x, None) is x
    assert model._dropouts(random_tokens(2, 24)) == (None, [BlockDropout()] * 2)
    assert decoder(dropout=0.5).eval()._dropouts(random_tokens(2, 24))[0] is None


def test_a_forward_without_its_key_is_an_error() -> None:
    model = decoder(dropout=0.5).train()
    with pytest.raises(ValueError, match="dropout in 2 rows needs their keys"):
        model(random_tokens(2, 24))


def test_rates_close_to_their_limits() -> None:
    keys = torch.zeros(1, dtype=torch.int64)
    assert kept(keys, 4096, 1e-12).all()
    assert not kept(keys, 4096, 1 - 1e-12).any()
