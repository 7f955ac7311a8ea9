"""The order of samples: a bijection, a new one each epoch, computable at any place."""

import itertools

import numpy as np
import pytest

from dtt.data.order import Order, mix, permute


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_permute_is_a_bijection(size):
    image = permute(np.arange(size, dtype=np.uint64), size, key=5)
    assert sorted(image.tolist()) == list(range(size))


def test_permute_looks_random():
    size = 10_000
    image = permute(np.arange(size, dtype=np.uint64), size, key=1).astype(float)
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.03
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.03
    assert (permute(np.arange(size, dtype=np.uint64), size, key=2) == image).mean() < 0.01


def test_permute_works_at_corpus_scale():
    size = 10**12 + 7
    index = np.random.default_rng(0).integers(0, size, 1000).astype(np.uint64)
    image = permute(index, size, key=3)
    assert image.max() < size and len(set(image.tolist())) == len(set(index.tolist()))


def test_mix_depends_on_every_value_and_place():
    assert len({mix(1, 2), mix(2, 1), mix(1, 3), mix(1), mix(1, 2, 0)}) == 5


@pytest.mark.parametrize("size", [1, 2, 20, 101, 9999])
def test_every_item_once_per_epoch_in_another_order(size):
    order = Order(size, seed=4)
    seen = []
    for epoch in range(3):
        epochs, items = order.places(epoch * size, size)
        assert (epochs == epoch).all()
        assert sorted(items.tolist()) == list(range(size))
        seen.append(items.tolist())
    assert size < 20 or (seen[0] != seen[1] and seen[1] != seen[2])


def test_places_do_not_depend_on_how_they_are_asked_for():
    order = Order(3000, seed=4)
    whole = order.places(0, 9000)
    for cuts in ((0, 3, 60, 9000), (0, 4096, 4097, 8192, 9000)):
        for kind in range(2):
            pieces = [order.places(a, b - a)[kind] for a, b in itertools.pairwise(cuts)]
            assert (np.concatenate(pieces) == whole[kind]).all()
