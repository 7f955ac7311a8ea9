"""Logits and gradients of the decoder against transformers' GPT-2, Llama, Qwen3, Mistral and
their mixtures of experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtt.config.model import Experts, Learned, Model, Rotary
from dtt.data.loader import IGNORED
from dtt.huggingface.folder import open_folder
from dtt.huggingface.settings import from_json
from dtt.model.decoder import Decoder
from dtt.model.loss import sum_cross_entropy

transformers = pytest.importorskip("transformers")

VOCABULARY, DIM, LAYERS, CONTEXT = 61, 32, 2, 48

BASE: dict[str, Any] = {
    "dim": DIM,
    "layers": LAYERS,
    "heads": 4,
    "hidden": 48,
    "context": CONTEXT,
    "vocab_size": VOCABULARY,
}
GPT2_SETTINGS = BASE | {
    "positions": Learned(),
    "activation": "gelu_tanh",
    "bias": True,
    "tied_head": True,
}
LLAMA_SETTINGS = BASE | {"kv_heads": 2, "norm": "rmsnorm", "activation": "swiglu"}
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA_SHARED = SHARED | {
    "hidden_size": DIM,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {"factor": 3.0},
    "yarn": {"factor": 3.0, "original": 16},
    "llama3": {"factor": 8.0, "original": 32},
}


def gpt2() -> tuple[Any, Decoder]:
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=DIM, n_layer=LAYERS, n_head=4, n_inner=48, n_positions=CONTEXT, **SHARED
        )
    )
    return theirs, Decoder(Model(**GPT2_SETTINGS))


def llama(scaling: str = "none") -> tuple[Any, Decoder]:
    figures = dict(SCALINGS[scaling])
    rope = {"rope_type": "default" if scaling == "none" else scaling, "rope_theta": 500.0}
    rotary: dict[str, Any] = {"theta": 500.0, "scaling": scaling}
    if figures:
        rope["factor"] = rotary["factor"] = figures["factor"]
    if "original" in figures:
        rope["original_max_position_embeddings"] = figures["original"]
        rotary["original_context"] = figures["original"]
    if scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(rope_parameters=rope, **LLAMA_SHARED)
    ours = Decoder(Model(**LLAMA_SETTINGS, positions=Rotary(**rotary)))
    return transformers.LlamaForCausalLM(config), ours


def qwen3() -> tuple[Any, Decoder]:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = transformers.Qwen3Config(head_dim=12, rope_parameters=rope, **LLAMA_SHARED)
    settings = LLAMA_SETTINGS | {"head_dim": 12, "qk_norm": True}
    ours = Decoder(Model(**settings, positions=Rotary(theta=1e6)))
    return transformers.Qwen3ForCausalLM(config), ours


def mistral() -> tuple[Any, Decoder]:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = transformers.MistralConfig(sliding_window=8, rope_parameters=rope, **LLAMA_SHARED)
    ours = Decoder(Model(**LLAMA_SETTINGS, window=8))
    return transformers.MistralForCausalLM(config), ours


def mixtral() -> tuple[Any, Decoder]:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = transformers.MixtralConfig(
        num_local_experts=8, num_experts_per_tok=2, rope_parameters=rope, **LLAMA_SHARED
    )
    ours = Decoder(Model(**LLAMA_SETTINGS, experts=Experts(number=8)))
    return transformers.MixtralForCausalLM(config), ours


def qwen3_moe(normalize: bool, every: int) -> tuple[Any, Decoder]:
    config = transformers.Qwen3MoeConfig(
        head_dim=12,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        norm_topk_prob=normalize,
        decoder_sparse_step=every,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        **LLAMA_SHARED,
    )
    experts = Experts(number=8, active=3, hidden=24, normalize=normalize, every=every)
    settings = LLAMA_SETTINGS | {"head_dim": 12, "qk_norm": True, "experts": experts}
    ours = Decoder(Model(**settings, positions=Rotary(theta=1e6)))
    return transformers.Qwen3MoeForCausalLM(config), ours


FAMILIES = {
    "gpt2": gpt2,
    "llama": llama,
    "llama-linear": lambda: llama("linear"),
    "llama-yarn": lambda: llama("yarn"),
    "llama3": lambda: llama("llama3"),
    "qwen3": qwen3,
    "mistral": mistral,
    "mixtral": mixtral,
    "qwen3-moe": lambda: qwen3_moe(normalize=True, every=1),
    "qwen3-moe-every-2": lambda: qwen3_moe(normalize=False, every=2),
}


FAMILIES_WITH_EXPERTS = ["mixtral", "qwen3-moe", "qwen3-moe-every-2"]


def translate(theirs: Any, folder: Path) -> dict[str, Tensor]:
    """Return the weights of a model of transformers under our names, by way of its own files and
    the tables of dtt.huggingface."""
    theirs.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    model, family = from_json(config, str(folder))
    shapes = {name: tuple(t.shape) for name, t in Decoder(model).state_dict().items()}
    return open_folder(folder, family, model, shapes).whole()


def pair(family: str, folder: Path) -> tuple[Any, Decoder]:
    """Return both models with the same random weights; biases and norms are random too."""
    torch.manual_seed(0)
    theirs, ours = FAMILIES[family]()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.25)
    ours.load_state_dict(translate(theirs, folder))
    return theirs.eval(), ours.eval()


def tokens_of(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(VOCABULARY, (2, length), generator=generator)


@pytest.mark.parametrize("length", [1, 5, CONTEXT])  # below and above Mistral's window of 8
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, length: int, tmp_path: Path) -> None:
    theirs, ours = pair(family, tmp_path)
    tokens = tokens_of(length)
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours(tokens)
    assert expected.std() > 0.5  # so that a difference would be seen
    share = 1e-5 * float(expected.max() - expected.min())
    torch.testing.assert_close(found, expected, rtol=0, atol=share)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "mistral", *FAMILIES_WITH_EXPERTS])
def test_gradients_of_a_summed_loss(family: str, tmp_path: Path) -> None:
    theirs, ours = pair(family, tmp_path)
    tokens, targets = tokens_of(20), tokens_of(21)[:, 1:].clone()
    targets[0, :3] = IGNORED
    logits = theirs(tokens).logits.flatten(0, 1)
    F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum").backward()
    hidden = ours.hidden(tokens).flatten(0, 1)
    sum_cross_entropy(hidden, ours.head_weight, targets.flatten(), IGNORED).backward()
    with torch.no_grad():  # their gradients take the way of weights
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    expected = translate(theirs, tmp_path / "gradients")
    for name, parameter in ours.named_parameters():
        scale = float(expected[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("family", ["llama3", "mistral", "mixtral"])
def test_cached_greedy_text_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    from dtt.generation import Sampling, stream_tokens

    theirs, ours = pair(family, tmp_path)
    prompt = tokens_of(6)[:1]
    expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, 6:]
    found = stream_tokens(ours, prompt.tolist(), 30, Sampling(temperature=0), seed=0, end=-1)
    assert [row[0] for row in found] == expected.tolist()
