"""Logits of exported models far out in a text: random weights, and weights after training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stock_models import (
    MODELS,
    VOCABULARY,
    drift,
    export_of,
    make_run,
    quick_files,
    random_decoder,
    trained_decoder,
)

from dtt.config.model import Model, Rotary
from dtt.model.decoder import Decoder
from dtt.model.positions import rotation_table

transformers = pytest.importorskip("transformers")
LENGTH = 1500
"""Tokens: beyond every window, every scaled context, and what the proof of an export looks at."""
SAME = 1e-5
"""Of the range of logits."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick_files(monkeypatch)


def take_angles(ours: Decoder, theirs: torch.nn.Module) -> None:
    """Give our decoder the cos and sin that transformers computes, if it has any."""
    for name, module in theirs.named_modules():
        if name.endswith("model.rotary_emb"):
            cos, sin = module(torch.zeros(1), torch.arange(LENGTH)[None])
            half = cos.shape[-1] // 2
            ours.rotate_by(torch.stack([cos[0, :, :half], sin[0, :, :half]]))


@pytest.mark.parametrize("weights", ["random", "trained"])
@pytest.mark.parametrize(
    "name",
    [
        *("gpt2", "dtt's default", "starcoder2-tied", "llama", "llama-tied-wide-heads"),
        *("llama-linear", "llama-ntk", "llama-yarn", "llama3", "mistral", "mistral-tied-linear"),
        *("qwen3-yarn", "qwen3-tied-window", "mixtral", "mixtral-tied-llama3"),
        *("qwen3-moe", "qwen3-moe-tied"),
    ],
)
def test_logits_are_the_same_far_out(name: str, weights: str) -> None:
    settings = MODELS[name][1] | {"context": LENGTH}
    if weights == "trained":
        settings |= {"init_std": 0.02}
    model = Model(**settings)
    made = trained_decoder(model) if weights == "trained" else random_decoder(model)
    run, ours = make_run(Path("runs/long"), settings, made=made)
    folder = export_of(run, verify=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(LENGTH)[None] ** 2 % VOCABULARY
    with torch.no_grad():
        found, by_itself = theirs(tokens).logits, ours(tokens)
        take_angles(ours, theirs)
        expected = ours(tokens)
    assert expected.std() > 0.1 and drift(expected, found) <= SAME
    # As people find it, each model with its own angles, as far as their rounding is less than that.
    near = LENGTH if weights == "trained" else 64 if model.experts else 1024
    assert drift(by_itself[:, :near], found[:, :near]) <= SAME


@pytest.mark.parametrize("place", [2047, 8191, 131071])
def test_dtts_angles_are_the_true_ones(place: int) -> None:
    """Against 50 digits. Those of transformers are rounded, and more so the farther out."""
    mpmath = pytest.importorskip("mpmath")
    theta, width = 10_000.0, 64
    with mpmath.workdps(50):
        angles = [place * mpmath.mpf(theta) ** (-mpmath.mpf(2 * i) / width) for i in range(32)]
        truth = [[float(f(angle)) for angle in angles] for f in (mpmath.cos, mpmath.sin)]
    exact = torch.tensor(truth, dtype=torch.float64)
    ours = rotation_table(Rotary(theta=theta), width, place + 1)[:, place]
    config = transformers.LlamaConfig(
        head_dim=width, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    theirs = torch.stack(rotary(torch.zeros(1), torch.tensor([[place]])))[:, 0, 0, : width // 2]
    error = float((ours - exact).abs().max())
    assert error <= 2**-24  # the rounding of fp32 itself
    assert float((theirs - exact).abs().max()) > 100 * error
