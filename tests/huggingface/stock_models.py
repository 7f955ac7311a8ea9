"""Runs of every architecture that can be exported, with random weights, and no training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dtt.config.data import TokenizerFile
from dtt.config.load import to_yaml
from dtt.config.model import Experts, Learned, Model, Rotary
from dtt.config.schema import Config
from dtt.huggingface.export import open_export, write_export
from dtt.model.decoder import Decoder
from dtt.tokenizer import CharTokenizer, Tokenizer, fingerprint
from dtt.training.checkpoint import Checkpoints

ALPHABET = "abcdefghijklmnopqrstuvwxyz .,\n'"
TOKENIZER = CharTokenizer(ALPHABET)
VOCABULARY, CONTEXT = 61, 96
"""More rows than the tokenizer has tokens, and an odd number of them."""
BASE: dict[str, Any] = {
    "dim": 32,
    "layers": 2,
    "heads": 4,
    "hidden": 48,
    "context": CONTEXT,
    "vocab_size": VOCABULARY,
    "init_std": 0.25,
}
GPT2 = BASE | {"positions": Learned(), "activation": "gelu_tanh", "bias": True, "tied_head": True}
LLAMA = BASE | {"kv_heads": 2, "norm": "rmsnorm", "activation": "swiglu", "norm_eps": 1e-6}
QWEN3 = LLAMA | {"head_dim": 12, "qk_norm": True, "positions": Rotary(theta=1e6)}
SCALED = {"factor": 4.0, "original_context": 24}
"""The context is that of the unscaled positions times the factor."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied-gelu": ("gpt2", GPT2 | {"tied_head": False, "activation": "gelu"}),
    "gpt2-without-biases": ("gpt2", GPT2 | {"bias": False, "activation": "relu2"}),
    "dtt's default": ("starcoder2", BASE),
    "starcoder2": (
        "starcoder2",
        BASE | {"bias": True, "activation": "gelu_tanh", "kv_heads": 1, "window": 9},
    ),
    "starcoder2-tied": ("starcoder2", BASE | {"tied_head": True}),
    "llama": ("llama", LLAMA),
    "llama-tied-wide-heads": ("llama", LLAMA | {"tied_head": True, "head_dim": 20}),
    "llama-with-biases": ("llama", LLAMA | {"bias": True, "kv_heads": None}),
    "llama-linear": ("llama", LLAMA | {"positions": Rotary(scaling="linear", factor=4.0)}),
    "llama-ntk": ("llama", LLAMA | {"positions": Rotary(scaling="ntk", factor=4.0)}),
    "llama-yarn": (
        "llama",
        LLAMA | {"positions": Rotary(scaling="yarn", beta_fast=16.0, beta_slow=2.0, **SCALED)},
    ),
    "llama3": (
        "llama",
        LLAMA | {"positions": Rotary(theta=5e5, scaling="llama3", high_freq_factor=3.0, **SCALED)},
    ),
    "mistral": ("mistral", LLAMA | {"window": 9}),
    "mistral-tied-linear": (
        "mistral",
        LLAMA | {"window": 9, "tied_head": True, "positions": Rotary(scaling="linear", factor=4.0)},
    ),
    "qwen3": ("qwen3", QWEN3),
    "qwen3-yarn": ("qwen3", QWEN3 | {"positions": Rotary(theta=1e6, scaling="yarn", **SCALED)}),
    "qwen3-tied-window": ("qwen3", QWEN3 | {"tied_head": True, "window": 9}),
    "mixtral": ("mixtral", LLAMA | {"experts": Experts(number=8), "window": 9}),
    "mixtral-tied-llama3": (
        "mixtral",
        LLAMA
        | {
            "experts": Experts(number=4),
            "tied_head": True,
            "positions": Rotary(theta=5e5, scaling="llama3", **SCALED),
        },
    ),
    "qwen3-moe": (
        "qwen3_moe",
        QWEN3 | {"experts": Experts(number=8, active=3, hidden=24, every=2, normalize=False)},
    ),
    "qwen3-moe-tied": ("qwen3_moe", QWEN3 | {"experts": Experts(number=4), "tied_head": True}),
}


def quick_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


def random_decoder(model: Model, seed: int = 0) -> Decoder:
    """Return a decoder in which every tensor is random, norms and biases too."""
    made = Decoder(model)
    made.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.25)
            elif name.endswith(("out.weight", "down.weight", "experts.down")):
                parameter.normal_(0, 0.25, generator=generator)
    return made.eval()


def trained_decoder(model: Model) -> Decoder:
    """Return a decoder after a few steps of training on a text that can be learnt."""
    made = Decoder(model)
    made.init_weights(0)
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    text = torch.arange(8 * 65).view(8, 65) ** 2 % VOCABULARY
    for _ in range(8):
        optimizer.zero_grad()
        logits = made.train()(text[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()
        optimizer.step()
        made.rebalance(lambda counts: counts)
    return made.eval()


def make_run(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    tokenizer: Tokenizer = TOKENIZER,
    section: Mapping[str, Any] | TokenizerFile | None = None,
    seed: int = 0,
    made: Decoder | None = None,
) -> tuple[Path, Decoder]:
    """Write a run folder with one checkpoint of a model, a random one unless it is given; return
    it and the model."""
    config = Config(
        name=folder.name,
        dir=folder.parent,
        model=Model(**settings),
        tokenizer=section or {"name": "char"},
    )
    made = made or random_decoder(config.model, seed)
    files = {
        "config.yaml": to_yaml(config).encode(),
        "tokenizer.json": tokenizer.to_json().encode(),
    }
    state = {
        "step": 7,
        "best_loss": None,
        "tokens": 12345,
        "tokenizer": fingerprint(tokenizer),
        "corpus": "book-char-0123456789ab",
        "scaler": {},
    }
    checkpoints = Checkpoints(folder / "checkpoints", keep=1, background=False, warn=print)
    checkpoints.save(7, {"model": made.state_dict(), "optimizer": {}}, state, files)
    checkpoints.finish()
    (folder / "config.yaml").write_bytes(files["config.yaml"])
    return folder, made


def export_of(run: Path, to: str = "hf", dtype: str = "fp32", **options: Any) -> Path:
    """Export a run below ./exports; return the folder."""
    folder = Path(f"exports/{run.name}-{to}-{dtype}")
    write_export(open_export(run, "last", to, dtype), folder, **options)
    return folder


def left_over(folder: Path = Path("exports")) -> list[str]:
    """What lies beside a folder that did not come to be."""
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def drift(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference, as a share of the range of what was expected."""
    return float((expected - found).abs().max() / (expected.max() - expected.min()))
