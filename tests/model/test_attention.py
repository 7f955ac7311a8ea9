"""Attention: in blocks against torch's, cached against uncached, padded against not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtt.config.model import Learned, Model, NoPositions, Rotary
from dtt.model.attention import Cache, visible
from dtt.model.blocked_attention import BLOCK, blocked_attention
from dtt.model.decoder import Decoder
from dtt.model.dropout import AttentionDropout, Randomness, sample_keys

LENGTHS = [1, 7, 255, 256, 257, 600, 1024]
SHARING = [(2, 2), (4, 2), (3, 1)]  # query heads, key and value heads


def inputs(length: int, heads: int = 2, kv_heads: int = 2) -> list[Tensor]:
    """q, k, v and a gradient of the output, fp64, of values that bf16 has exactly."""
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(2, count, length, 16, generator=generator).bfloat16().double()
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def outcome(attend: Any, given: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of q, k, v, all as fp64."""
    q, k, v, grad = (x.to(dtype) for x in given)
    for x in (q, k, v):
        x.requires_grad_()
    y = attend(q, k, v)
    return [x.double() for x in (y.detach(), *torch.autograd.grad(y, (q, k, v), grad))]


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("length", LENGTHS)
def test_blocked_attention_is_that_of_torch(length: int) -> None:
    given = inputs(length)
    expected = outcome(torch_attention, given, torch.float64)
    for found, exact in zip(
        outcome(blocked_attention, given, torch.float32), expected, strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", SHARING)
@pytest.mark.parametrize("length", [7, BLOCK + 1])
def test_blocked_attention_with_shared_keys_and_values(length: int, heads: tuple[int, int]) -> None:
    given = inputs(length, *heads)
    expected = outcome(torch_attention, given, torch.float64)
    for found, exact in zip(
        outcome(blocked_attention, given, torch.float32), expected, strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_blocked_attention_in_bf16_is_within_its_rounding(length: int) -> None:
    given = inputs(length)
    expected = outcome(torch_attention, given, torch.float64)
    blocked = outcome(blocked_attention, given, torch.bfloat16)
    for found, exact in zip(blocked, expected, strict=True):
        # Half a unit in the last of 8 bits is 2**-9; scores, weights and sums each round.
        assert float((found - exact).norm()) <= 2**-7 * float(exact.norm()) + 1e-6


@pytest.mark.parametrize("place", [0, 3, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
def test_blocked_attention_sees_no_later_token(place: int) -> None:
    q, k, v, _ = (x.float() for x in inputs(2 * BLOCK + 9))
    before = blocked_attention(q, k, v)
    for x in (q, k, v):
        x[:, :, place] += 1.0
    moved = (blocked_attention(q, k, v) - before).abs().amax((0, 1, 3))
    assert (moved[:place] == 0).all() and (moved[place:] > 0).all()


def test_every_row_of_the_window_mask_by_hand() -> None:
    places = torch.arange(4)
    assert visible(places[:, None], places, None).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]
    assert visible(places[:, None], places, 2).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]


CONTEXT = 24
POSITIONS: dict[str, Any] = {
    "rotary": Rotary(),
    "yarn": Rotary(scaling="yarn", factor=3, original_context=8),
    "learned": Learned(),
    "none": NoPositions(),
}
VARIANTS = [
    pytest.param({"positions": at} | shape, id=f"{name}-{shape}")
    for name, at in POSITIONS.items()
    for shape in ({}, {"kv_heads": 2}, {"window": 5}, {"kv_heads": 1, "window": 3})
]


def decoder(settings: dict[str, Any]) -> Decoder:
    base = {"dim": 32, "layers": 2, "heads": 4, "vocab_size": 61, "init_std": 0.25}
    model = Decoder(Model(**(base | {"context": CONTEXT, "qk_norm": True} | settings)))
    model.init_weights(0)
    return model.eval()


def cache_of(model: Decoder, padding: list[int]) -> Cache:
    return Cache(model.settings, len(padding), CONTEXT, torch.tensor(padding), torch.float32)


# The whole at once; token by token; a prompt and then tokens; a prompt in pieces.
PIECES = [[CONTEXT], [1] * CONTEXT, [10] + [1] * (CONTEXT - 10), [7, 1, 9, 2, CONTEXT - 19]]


@pytest.mark.parametrize("settings", VARIANTS)
@torch.inference_mode()
def test_cached_logits_are_the_uncached_ones(settings: dict[str, Any]) -> None:
    model = decoder(settings)
    tokens = torch.randint(61, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
    expected = model(tokens)
    for pieces in PIECES:
        cache = cache_of(model, [0, 0, 0])
        found = torch.cat([model(part, cache=cache) for part in tokens.split(pieces, 1)], 1)
        assert cache.length == CONTEXT
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", VARIANTS)
@torch.inference_mode()
def test_padded_rows_are_as_good_as_alone(settings: dict[str, Any]) -> None:
    model, padding = decoder(settings), [0, 5, 9]
    tokens = torch.randint(61, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
    for row, count in enumerate(padding):
        tokens[row, :count] = row  # what stands in the padding must not matter
    for pieces in ([CONTEXT], [12, 4, *[1] * (CONTEXT - 16)]):
        cache = cache_of(model, padding)
        found = torch.cat([model(part, cache=cache) for part in tokens.split(pieces, 1)], 1)
        assert found.isfinite().all()
        for row, count in enumerate(padding):
            alone = model(tokens[row : row + 1, count:])[0]
            torch.testing.assert_close(found[row, count:], alone, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_next_logits_are_the_last_ones() -> None:
    model = decoder({})
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))
    found = model.next_logits(tokens, cache_of(model, [0, 0]))
    torch.testing.assert_close(found, model(tokens)[:, -1], rtol=0, atol=1e-5)


def test_dropout_falls_on_attention_weights() -> None:
    block, random = decoder({}).blocks[0].attention, Randomness(0.5, layers=1)
    x = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))

    def weights(seed: int) -> AttentionDropout | None:
        random.keys = sample_keys(seed, range(1), x.device)
        return random.dropouts(1, 8)[1][0].weights

    with torch.no_grad():
        samples = torch.stack([block(x, None, None, None, weights(s)) for s in range(2000)])
        exact = block(x, None, None, None)
    assert not torch.equal(samples[0], samples[1])
    error = (samples.mean(0) - exact).abs() / (samples.std(0) / 2000**0.5 + 1e-9)
    assert float(error.max()) < 5  # standard errors: dropout is unbiased
