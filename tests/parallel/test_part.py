"""Parts of tensors: what is cut out and put back is the tensor, however ranks divide it."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dtt.parallel.part import Part, Range, share_of

SHAPES = ((), (0,), (1,), (7,), (509,), (5, 4), (0, 3), (6, 1, 5), (3, 2, 4, 2))


def numbered(shape: tuple[int, ...]) -> Tensor:
    """A tensor of which every element is its own number, from 1 on."""
    return torch.arange(1, torch.Size(shape).numel() + 1).view(shape)


def some_ranges(draw: random.Random, size: int) -> tuple[Range, ...]:
    """Up to three ranges of a dim that follow each other, perhaps none."""
    cuts = sorted(draw.randint(0, size) for _ in range(2 * draw.randint(0, 3)))
    pairs = zip(cuts[::2], cuts[1::2], strict=True)
    return tuple((a, b) for a, b in pairs if a < b)


def some_part(draw: random.Random, shape: tuple[int, ...]) -> Part:
    return Part(shape, tuple(some_ranges(draw, size) for size in shape))


def rows(ranges: tuple[Range, ...]) -> list[int]:
    return [index for a, b in ranges for index in range(a, b)]


def picked(whole: Tensor, part: Part) -> Tensor:
    """What `take` must return, picked index by index."""
    for dim, ranges in enumerate(part.ranges):
        whole = whole.index_select(dim, torch.tensor(rows(ranges), dtype=torch.int64))
    return whole


@pytest.mark.parametrize("shape", SHAPES)
def test_take_picks_the_ranges_and_put_puts_them_back(shape: tuple[int, ...]) -> None:
    draw, whole = random.Random(repr(shape)), numbered(shape)
    for _ in range(50):
        part = some_part(draw, shape)
        local = part.take(whole)
        assert local.shape == part.local_shape and torch.equal(local, picked(whole, part))
        found = torch.zeros_like(whole)
        part.put(local, found)
        inside = torch.isin(whole, local)
        assert torch.equal(found, whole.where(inside, 0))


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_cover_every_element_of_both_once(shape: tuple[int, ...]) -> None:
    draw = random.Random(repr(shape))
    for _ in range(50):
        part = some_part(draw, shape)
        whole, local = torch.zeros(shape), torch.zeros(part.local_shape)
        for there, here in part.boxes():
            assert whole[there].shape == local[here].shape
            whole[there] += 1
            local[here] += 1
        assert torch.equal(local, torch.ones(part.local_shape))
        assert torch.equal(part.take(whole), local) and whole.sum() == local.sum()


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape])
def test_narrow_is_narrow_of_the_ranks_tensor(shape: tuple[int, ...]) -> None:
    draw, whole = random.Random(repr(shape)), numbered(shape)
    for _ in range(50):
        part = some_part(draw, shape)
        dim = draw.randrange(len(shape))
        start, stop = sorted(draw.randint(0, part.local_shape[dim]) for _ in range(2))
        narrowed = part.narrow(dim, start, stop)
        expected = part.take(whole).narrow(dim, start, stop - start)
        assert torch.equal(narrowed.take(whole), expected)
        assert (narrowed.shape, narrowed.owned) == (part.shape, part.owned)


def test_a_part_of_a_part_by_hand() -> None:
    """Rank 1 of 2 has the second halves of q [8], k [4] and v [4]; of those rank 0 of 3 has 2."""
    part = Part((16, 5), (((4, 8), (10, 12), (14, 16)), ((0, 5),)), owned=False)
    assert part.local_shape == (8, 5) and not part.is_all
    assert part.narrow(0, 3, 7).ranges == (((7, 8), (10, 12), (14, 15)), ((0, 5),))
    assert part.narrow(0, 4, 6).ranges == (((10, 12),), ((0, 5),))
    assert part.narrow(0, 8, 8).ranges == ((), ((0, 5),))
    assert part.narrow(0, 8, 8).local_shape == (0, 5) and not part.narrow(0, 0, 4).owned


def test_what_is_taken_is_a_copy() -> None:
    for shape in SHAPES:
        whole = numbered(shape)
        local = Part.all_of(shape).take(whole)
        assert torch.equal(local, whole) and Part.all_of(shape).is_all
        local += 1
        assert torch.equal(whole, numbered(shape))


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 8])
def test_shares_are_those_of_chunk(number: int) -> None:
    for length in (1, 2, 3, 5, 8, 9, 16, 31, 509):
        shares = [share_of(length, number, index) for index in range(number)]
        chunks = [chunk.tolist() for chunk in torch.arange(length).chunk(number)]
        found = [list(range(*share)) for share in shares]
        assert found == chunks + [[]] * (number - len(chunks))
        assert [a for a, _ in shares[1:]] == [b for _, b in shares[:-1]] and shares[-1][1] == length
