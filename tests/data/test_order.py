"""The order of samples: a bijection, a new one each epoch, computable at any place."""

import numpy as np
import pytest

from dtt.data.order import WindowOrder, mix, permute


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


@pytest.mark.parametrize("length", [11, 20, 21, 101, 999])
def test_every_window_once_per_epoch(length):
    order = WindowOrder(length, context=10, seed=4)
    for epoch in range(3):
        starts = order.starts(epoch * order.windows, order.windows)
        assert len(set(starts.tolist())) == order.windows
        assert (np.diff(np.sort(starts)) == 10).all()
        assert starts.min() >= 0 and starts.max() + 11 <= length


def test_epochs_differ_in_order_and_division():
    order = WindowOrder(2000, context=10, seed=4)
    first, second = (order.starts(e * order.windows, order.windows) for e in (0, 1))
    assert (first != second).any()
    assert first.min() % 10 == 0 and (first % 10 != second % 10).all()


def test_starts_do_not_depend_on_how_they_are_asked_for():
    order = WindowOrder(501, context=10, seed=4)
    whole = order.starts(0, 200)
    pieces = [order.starts(a, b - a) for a, b in ((0, 3), (3, 60), (60, 200))]
    assert (np.concatenate(pieces) == whole).all()
