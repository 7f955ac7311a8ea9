"""Dropout as arithmetic: whether an activation is dropped is a function of where it is.

The seed of the step, the sample's number in it, the place in the model, the token's column in its
row, and the feature decide, and nothing else: no generator has a state (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"). So masks are the same however ranks and forwards
divide samples, blocks, heads and columns among them, and in a block that is computed again.

A row of features has a 64-bit key: chained splitmix64 finalisers (Steele et al. 2014), as in
`dtt.data.order.mix`. The features take a 32-bit hash each with the multipliers of lowbias32
(Wellons 2018, "Prospecting for hash functions"), which costs less than a draw from a generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def _signed(value: int, bits: int) -> int:
    """The integer of so many bits, with a sign, that has the lowest bits of `value`."""
    half = 1 << bits - 1
    return (value + half) % (2 * half) - half


_MIX = _signed(0xBF58476D1CE4E5B9, 64), _signed(0x94D049BB133111EB, 64)
_SPREAD, *_LOWBIAS = (_signed(m, 32) for m in (0x9E3779B9, 0x7FEB352D, 0x846CA68B))


def mix(keys: Tensor | int, values: Tensor) -> Tensor:
    """Return 64-bit hashes (int64) of keys and values, which broadcast.

    `mix(mix(*a), b)` of `dtt.data.order` is `mix(*a, b)`: so is this one, of tensors.
    """
    # Shifts keep the sign, which the masks remove.
    state = (values ^ keys) * _MIX[0]
    state = (state ^ state >> 27 & (1 << 37) - 1) * _MIX[1]
    return state ^ state >> 31 & (1 << 33) - 1


def kept(keys: Tensor, count: int, rate: float) -> Tensor:
    """Return which of the `count` elements behind each key [..., 1] stay: bool [..., count].

    Each is dropped with probability `rate`, to 2^-32.
    """
    low, high = keys.int(), (keys >> 32).int()
    state = low ^ torch.arange(count, dtype=torch.int32, device=keys.device) * _SPREAD
    state.mul_(_LOWBIAS[0])
    state.bitwise_xor_((state >> 15).bitwise_and_(0x1FFFF))
    # Keys that share 32 bits still have different elements. The lowest bits, which are not mixed
    # as well as the highest, need no last shift: they do not decide a comparison.
    state.add_(high).mul_(_LOWBIAS[1])
    return state >= min(round(rate * 2**32), 2**32 - 1) - 2**31


@dataclass(frozen=True)
class Dropout:
    """Dropout of activations [B, T, features] at one place in the model (Srivastava et al. 2014).

    What stays is divided by 1 - rate, so that the mean stays too.
    """

    rate: float
    """In (0, 1)."""
    keys: Tensor
    """[B] int64, of the samples at this place."""
    columns: Tensor
    """[T] int64: the tokens' places in the whole row."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return x [B, T, features] in its type; the backward pass keeps a byte an element."""
        keys = mix(self.keys[:, None], self.columns)[..., None]
        return x * kept(keys, x.shape[-1], self.rate) / (1 - self.rate)


@dataclass(frozen=True)
class AttentionDropout:
    """Dropout of attention weights [B, heads, Q, T], which attention applies after its softmax.

    `dataclasses.replace(dropout, columns=...)` is that of some of the queries. The T keys are
    always those of columns 0 to T - 1.
    """

    rate: float
    """In (0, 1)."""
    keys: Tensor
    """[B] int64, of the samples at this place."""
    columns: Tensor
    """[Q] int64: the queries' places in the whole row."""
    first_head: int
    """Number of the first of the heads that are here."""

    def query_keys(self, heads: int) -> Tensor:
        """Return what `kept` takes for so many heads, int64 [B, heads, Q, 1]."""
        stop = self.first_head + heads
        numbers = torch.arange(self.first_head, stop, device=self.keys.device)
        return mix(mix(self.keys[:, None], numbers)[..., None], self.columns)[..., None]


@dataclass(frozen=True)
class BlockDropout:
    """What a block drops, of its attention weights and of what it adds to the residual stream."""

    weights: AttentionDropout | None = None
    attention: Dropout | None = None
    mlp: Dropout | None = None


NO_DROPOUT = BlockDropout()


def drop(x: Tensor, dropout: Dropout | None) -> Tensor:
    """Return x [B, T, features] after dropout, x itself if there is none."""
    return x if dropout is None else dropout(x)


def sample_keys(seed: int, samples: range, device: torch.device) -> Tensor:
    """Return the keys [B] int64 of samples with these numbers in a step that has this seed."""
    numbers = torch.arange(samples.start, samples.stop, device=device)
    return mix(_signed(seed, 64), numbers)


class Randomness:
    """Decides what a decoder drops: what trains it sets `keys` before each forward.

    What divides rows or heads among ranks sets which of them are here. Places are numbered through
    the whole model, so that a part of it needs to know nothing.
    """

    def __init__(self, rate: float, layers: int) -> None:
        self.rate, self.layers = rate, layers
        self.keys: Tensor | None = None
        """[B] int64: of the rows, by `sample_keys`."""
        self.columns: Tensor | None = None
        """[T] int64: columns of the residual stream; None: all, from 0 on."""
        self.attention_columns: Tensor | None = None
        """[Q] int64: columns of the queries; None: all, from 0 on."""
        self.first_head = 0
        """Number of the first query head."""

    def dropouts(self, batch: int, length: int) -> tuple[Dropout, list[BlockDropout]]:
        """Return what a forward of [batch, length] tokens drops: embedded ones, and in each block.

        It is the forward's own: other `keys` do not change it. ValueError if the rows have none.
        """
        if self.keys is None or len(self.keys) != batch:
            raise ValueError(f"dropout in {batch} rows needs their keys: set randomness.keys")
        device = self.keys.device
        places = torch.arange(1 + 3 * self.layers, device=device)
        keys = mix(self.keys, places[:, None])
        plain = torch.arange(length, device=device)
        columns = plain if self.columns is None else self.columns.to(device)
        queries = plain if self.attention_columns is None else self.attention_columns.to(device)
        blocks = [
            BlockDropout(
                AttentionDropout(self.rate, keys[place], queries, self.first_head),
                Dropout(self.rate, keys[place + 1], columns),
                Dropout(self.rate, keys[place + 2], columns),
            )
            for place in range(1, len(places), 3)
        ]
        return Dropout(self.rate, keys[0], columns), blocks
