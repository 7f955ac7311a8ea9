"""The ledger: one number for each optimizer step that says which samples the step saw.

The number is a sum over the step's samples, so every rank computes its own part from what it
really read, and the parts add up in the sum over ranks that a step makes anyway. It depends on
which sample stood at which place of the global batch, and on nothing else: not on ranks, workers,
accumulation or restarts. It guards against faults, not against forgery.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
BITS = 32
"""Bits of a sample's part: sums of 2^21 samples are exact in fp64."""


def seen(first: int, sources: Sequence[int], starts: Sequence[int]) -> int:
    """Return one rank's part of a step's number, below 2^32 times its samples.

    `first` is the number in the run of its first sample: (step) x batch_size + rank x share, with
    steps from 0. `sources` and `starts` are the batch's own: where each sample was read.
    """
    places = np.arange(first, first + len(starts), dtype=np.uint64)
    mixed = _mix(_mix(_mix(places) ^ _unsigned(sources)) ^ _unsigned(starts))
    return int((mixed >> np.uint64(64 - BITS)).sum())


def _unsigned(values: Sequence[int]) -> U64:
    return np.asarray(values, np.int64).astype(np.uint64)


def _mix(values: U64) -> U64:
    """The finaliser of splitmix64 (Steele et al. 2014), which changes half the bits for any one."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
