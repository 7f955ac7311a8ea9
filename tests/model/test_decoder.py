"""The decoder: parameter counts, initial weights, causality, options that must change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dtt.config.load import load_config
from dtt.config.model import Learned, Model, NoPositions, Rotary
from dtt.model.decoder import Decoder, count_parameters
from dtt.model.dropout import sample_keys
from dtt.model.recompute import Recompute

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-124m": 124_439_808,
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "tinyllama-1.1b": 1_100_048_384,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
}
STYLES: dict[str, dict[str, Any]] = {
    "default": {},
    "gpt2": {"positions": Learned(), "activation": "gelu_tanh", "bias": True, "tied_head": True},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "kv_heads": 2},
    "qwen3": {"norm": "rmsnorm", "activation": "swiglu", "kv_heads": 1, "qk_norm": True},
    "window": {"window": 5},
    "no positions": {"positions": NoPositions()},
}


def decoder(**settings: Any) -> Decoder:
    """A small decoder with weights large enough that every path shows in the logits."""
    shape = {"dim": 32, "layers": 2, "heads": 4, "context": 24, "vocab_size": 61}
    model = Decoder(Model(**(shape | {"init_std": 0.25} | settings)))
    model.init_weights(0)
    return model.eval()


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(preset: str) -> None:
    with torch.device("meta"):
        model = Decoder(load_config([preset]).model)
    assert count_parameters(model) == PUBLISHED[preset]


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ({"dim": 768}, 3072),
        ({"dim": 768, "activation": "swiglu"}, 2048),
        ({"dim": 100, "heads": 5, "activation": "swiglu"}, 320),
        ({"dim": 768, "hidden": 5}, 5),
    ],
)
def test_width_of_the_mlp(settings: dict[str, Any], width: int) -> None:
    assert Model(**settings).mlp_width == width


def test_initial_weights_have_the_spread_they_are_said_to_have() -> None:
    model = decoder(dim=128, layers=8, bias=True, init_std=0.02)
    for name, parameter in model.state_dict().items():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.02 / 4 if residual else 0.02
            assert float(parameter.std()) == pytest.approx(std, rel=0.05), name
            assert abs(float(parameter.mean())) < std / 20, name


def test_initial_weights_are_a_function_of_the_seed() -> None:
    first, again = (decoder().state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_fresh_model_knows_nothing() -> None:
    model = decoder(dim=64, init_std=0.02)
    tokens = random_tokens(4, 24)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    assert float(loss) == pytest.approx(torch.tensor(61.0).log().item(), rel=0.02)


@pytest.mark.parametrize("style", STYLES)
def test_a_token_changes_nothing_before_it_and_everything_behind_it(style: str) -> None:
    model, tokens = decoder(**STYLES[style]), random_tokens(1, 24)
    changed = tokens.clone()
    changed[0, 10] = (tokens[0, 10] + 1) % 61
    with torch.no_grad():
        moved = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert (moved[:10] == 0).all()
    # With a window a token reaches (window - 1) x layers further.
    reach = 24 if model.settings.window is None else 10 + 4 * 2 + 1
    assert (moved[10:reach] > 1e-4).all() and (moved[reach:] == 0).all()


@pytest.mark.parametrize("style", STYLES)
def test_rows_do_not_depend_on_each_other(style: str) -> None:
    model, tokens = decoder(**STYLES[style]), random_tokens(3, 24)
    with torch.no_grad():
        both, alone = model(tokens), torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("style", ["default", "gpt2", "llama"])
def test_positions_given_are_the_positions_used(style: str) -> None:
    model, tokens = decoder(**STYLES[style]), random_tokens(2, 12)
    places = torch.arange(12).expand(2, -1)
    with torch.no_grad():
        plain = model(tokens)
        torch.testing.assert_close(model(tokens, places), plain, rtol=0, atol=1e-5)
        shifted, stretched = model(tokens, places + 7), model(tokens, places * 2)
    # Rotary positions are relative; learned ones are not.
    same = bool(torch.allclose(shifted, plain, atol=1e-4))
    assert same == isinstance(model.settings.positions, Rotary)
    assert not torch.allclose(stretched, plain, atol=1e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_blocks_give_the_same_gradients_bitwise(dropout: float) -> None:
    results = []
    for recompute in (False, True):
        model = decoder(dropout=dropout).train()
        model.recompute = Recompute() if recompute else None
        model.randomness.keys = sample_keys(5, range(2), torch.device("cpu"))
        loss = model(random_tokens(2, 24)).square().mean()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_acts_in_training_only() -> None:
    model, tokens = decoder(dropout=0.5), random_tokens(2, 24)
    with torch.no_grad():
        assert torch.equal(model(tokens), decoder()(tokens))
        model.train().randomness.keys = sample_keys(0, range(2), torch.device("cpu"))
        assert not torch.equal(model(tokens), decoder()(tokens))


@pytest.mark.parametrize("style", STYLES)
def test_bf16_computes_the_same_model(style: str) -> None:
    model, tokens = decoder(**(STYLES[style] | {"init_std": 0.08})), random_tokens(2, 24)
    with torch.no_grad():
        exact = model(tokens)
        rough = model.compute_in(torch.bfloat16)(tokens)
        converted = model.to(torch.bfloat16)(tokens)  # as a loaded run has its parameters
    assert rough.dtype == converted.dtype == torch.bfloat16
    for found in (rough, converted):
        assert float((found.float() - exact).norm() / exact.norm()) < 0.02


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = decoder(tied_head=True), decoder()
    assert tied.head is None and tied.head_weight is tied.embed.weight
    assert count_parameters(untied) - count_parameters(tied) == 61 * 32
