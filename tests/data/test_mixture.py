"""Shares of a mixture: exact, spread evenly, computable at any place, capped."""

import itertools

import numpy as np
import pytest

from dtt.data.mixture import BLOCK, Shares


def counts(shares: Shares, n: int, sources: int) -> np.ndarray:
    return np.bincount(shares.assign(0, n)[0], minlength=sources)


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [5, 1, 0.01], [1, 1, 1, 1]])
def test_shares_are_exact_over_any_run_of_samples(weights):
    shares = Shares(weights, [None] * len(weights))
    part = np.array(weights) / sum(weights)
    n = 3 * BLOCK
    running = np.cumsum(shares.assign(0, n)[0][:, None] == np.arange(len(weights)), axis=0)
    off = running - np.arange(1, n + 1)[:, None] * part
    assert np.abs(off).max() <= len(weights)


@pytest.mark.parametrize("limits", [[None] * 3, [None, 40, None], [None, None, 9000]])
def test_shares_far_below_one_sample_a_block(limits):
    for weights in ([0.65, 0.00005, 0.34995], [1e-6, 0.3, 0.7], [0.5, 0.5, 1e-9]):
        shares = Shares(weights, limits)
        n = 100 * BLOCK
        found = counts(shares, n, 3)
        assert found.sum() == n
        assert all(most is None or one <= most for one, most in zip(found, limits, strict=True))
        if limits == [None] * 3:
            assert np.abs(found - n * np.array(weights) / sum(weights)).max() <= 3


def test_any_place_is_computed_alone():
    shares = Shares([0.61, 0.29, 0.1], [None, 5000, None])
    whole, _ = shares.assign(0, 5 * BLOCK)
    for cuts in ((0, 7, BLOCK - 1, BLOCK + 1, 3 * BLOCK, 5 * BLOCK), (0, 2 * BLOCK, 5 * BLOCK)):
        fresh = Shares([0.61, 0.29, 0.1], [None, 5000, None])
        for a, b in reversed(list(itertools.pairwise(cuts))):
            sources, first = fresh.assign(a, b - a)
            assert (sources == whole[a:b]).all()
            assert first == np.bincount(whole[:a], minlength=3).tolist()


def test_a_source_stops_at_its_limit_and_the_others_share_its_part():
    shares = Shares([0.5, 0.3, 0.2], [1000, None, None])
    n = 50_000
    found = counts(shares, n, 3)
    assert found[0] == 1000
    assert counts(shares, 1000, 3).tolist() == pytest.approx([500, 300, 200], abs=2)
    assert counts(shares, 1990, 3)[0] == pytest.approx(995, abs=2)
    # 1000 samples of the first source are there with the others' 600 and 400.
    assert abs(found[1] - (600 + (n - 2000) * 0.6)) <= 3
    last = shares.assign(n, BLOCK)[0]
    assert (last != 0).all()


def test_limits_everywhere_end_the_mixture_exactly():
    limits = [1000, 10, 7777]
    shares = Shares([1, 1, 1], limits)
    assert shares.total == sum(limits)
    assert counts(shares, shares.total, 3).tolist() == limits


def test_shares_hold_at_the_scale_of_a_trillion_tokens():
    shares = Shares([2, 1], [None, None])
    place = 10**12
    sources, first = shares.assign(place, 9)
    assert sorted(np.bincount(sources).tolist()) == [3, 6]
    assert abs(first[1] - place / 3) < 2 and sum(first) == place
