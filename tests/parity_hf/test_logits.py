"""Logits and gradients of the decoder against transformers' GPT-2, Llama, Qwen3, Mistral and
their mixtures of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtt.config.model import Experts, Learned, Model, Rotary
from dtt.data.loader import IGNORED
from dtt.model.decoder import Decoder
from dtt.model.loss import sum_cross_entropy

transformers = pytest.importorskip("transformers")

VOCABULARY, DIM, LAYERS, CONTEXT = 61, 32, 2, 48

# Ours to theirs; {n} is the block. Several names are stacked, since q, k and v are one matrix here.
GPT2 = {
    "embed.weight": ["transformer.wte.weight"],
    "position_embed.weight": ["transformer.wpe.weight"],
    "blocks.{n}.attention_norm": ["transformer.h.{n}.ln_1"],
    "blocks.{n}.attention.qkv": ["transformer.h.{n}.attn.c_attn"],
    "blocks.{n}.attention.out": ["transformer.h.{n}.attn.c_proj"],
    "blocks.{n}.mlp_norm": ["transformer.h.{n}.ln_2"],
    "blocks.{n}.mlp.up": ["transformer.h.{n}.mlp.c_fc"],
    "blocks.{n}.mlp.down": ["transformer.h.{n}.mlp.c_proj"],
    "norm": ["transformer.ln_f"],
}
LLAMA = {
    "embed.weight": ["model.embed_tokens.weight"],
    "head.weight": ["lm_head.weight"],
    "blocks.{n}.attention_norm": ["model.layers.{n}.input_layernorm"],
    "blocks.{n}.attention.qkv": [f"model.layers.{{n}}.self_attn.{p}_proj" for p in "qkv"],
    "blocks.{n}.attention.out": ["model.layers.{n}.self_attn.o_proj"],
    "blocks.{n}.attention.q_norm": ["model.layers.{n}.self_attn.q_norm"],
    "blocks.{n}.attention.k_norm": ["model.layers.{n}.self_attn.k_norm"],
    "blocks.{n}.mlp_norm": ["model.layers.{n}.post_attention_layernorm"],
    "blocks.{n}.mlp.gate": ["model.layers.{n}.mlp.gate_proj"],
    "blocks.{n}.mlp.up": ["model.layers.{n}.mlp.up_proj"],
    "blocks.{n}.mlp.down": ["model.layers.{n}.mlp.down_proj"],
    "blocks.{n}.mlp.router": ["model.layers.{n}.mlp.gate"],
    "blocks.{n}.mlp.experts.gate": ["model.layers.{n}.mlp.experts.gate_proj"],
    "blocks.{n}.mlp.experts.up": ["model.layers.{n}.mlp.experts.up_proj"],
    "blocks.{n}.mlp.experts.down": ["model.layers.{n}.mlp.experts.down_proj"],
    "norm": ["model.norm"],
}
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


def gpt2() -> tuple[Any, Decoder, dict[str, list[str]]]:
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=DIM, n_layer=LAYERS, n_head=4, n_inner=48, n_positions=CONTEXT, **SHARED
        )
    )
    return theirs, Decoder(Model(**GPT2_SETTINGS)), GPT2


def llama(scaling: str = "none") -> tuple[Any, Decoder, dict[str, list[str]]]:
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
    return transformers.LlamaForCausalLM(config), ours, LLAMA


def qwen3() -> tuple[Any, Decoder, dict[str, list[str]]]:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = transformers.Qwen3Config(head_dim=12, rope_parameters=rope, **LLAMA_SHARED)
    settings = LLAMA_SETTINGS | {"head_dim": 12, "qk_norm": True}
    ours = Decoder(Model(**settings, positions=Rotary(theta=1e6)))
    return transformers.Qwen3ForCausalLM(config), ours, LLAMA


def mistral() -> tuple[Any, Decoder, dict[str, list[str]]]:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = transformers.MistralConfig(sliding_window=8, rope_parameters=rope, **LLAMA_SHARED)
    ours = Decoder(Model(**LLAMA_SETTINGS, window=8))
    return transformers.MistralForCausalLM(config), ours, LLAMA


def mixtral() -> tuple[Any, Decoder, dict[str, list[str]]]:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = transformers.MixtralConfig(
        num_local_experts=8, num_experts_per_tok=2, rope_parameters=rope, **LLAMA_SHARED
    )
    ours = Decoder(Model(**LLAMA_SETTINGS, experts=Experts(number=8)))
    return transformers.MixtralForCausalLM(config), ours, LLAMA


def qwen3_moe(normalize: bool, every: int) -> tuple[Any, Decoder, dict[str, list[str]]]:
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
    return transformers.Qwen3MoeForCausalLM(config), ours, LLAMA


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


def translate(
    theirs: dict[str, Tensor], ours: Decoder, table: dict[str, list[str]]
) -> dict[str, Tensor]:
    """Return tensors under our names: weights, or gradients of them."""
    made, theirs = {}, dict(theirs)
    for name in [name for name in theirs if name.endswith(".gate_up_proj")]:
        for part, stack in zip(("gate", "up"), theirs[name].chunk(2, dim=1), strict=True):
            theirs[name.replace(".gate_up_", f".{part}_")] = stack
    for name, _ in ours.named_parameters():
        parts = name.split(".")
        block = parts[1] if parts[0] == "blocks" else ""
        key = name.replace(f".{block}.", ".{n}.", 1) if block else name
        suffix = ""
        if key not in table:
            key, _, suffix = key.rpartition(".")
        sources = [f"{s}.{suffix}".rstrip(".").replace("{n}", block) for s in table[key]]
        tensor = torch.cat([theirs[source] for source in sources])
        # GPT-2's linear layers are Conv1D, whose weights are [in, out].
        conv = table is GPT2 and suffix == "weight" and tensor.ndim == 2
        made[name] = tensor.t().contiguous() if conv else tensor
    return made


def pair(family: str) -> tuple[Any, Decoder, dict[str, list[str]]]:
    """Return both models with the same random weights; biases and norms are random too."""
    torch.manual_seed(0)
    theirs, ours, table = FAMILIES[family]()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.25)
    ours.load_state_dict(translate(theirs.state_dict(), ours, table))
    return theirs.eval(), ours.eval(), table


def tokens_of(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(VOCABULARY, (2, length), generator=generator)


@pytest.mark.parametrize("length", [1, 5, CONTEXT])  # below and above Mistral's window of 8
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, length: int) -> None:
    theirs, ours, _ = pair(family)
    tokens = tokens_of(length)
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours(tokens)
    assert expected.std() > 0.5  # so that a difference would be seen
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "mistral", *FAMILIES_WITH_EXPERTS])
def test_gradients_of_a_summed_loss(family: str) -> None:
    theirs, ours, table = pair(family)
    tokens, targets = tokens_of(20), tokens_of(21)[:, 1:].clone()
    targets[0, :3] = IGNORED
    logits = theirs(tokens).logits.flatten(0, 1)
    F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum").backward()
    hidden = ours.hidden(tokens).flatten(0, 1)
    sum_cross_entropy(hidden, ours.head_weight, targets.flatten(), IGNORED).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    expected = translate(gradients, ours, table)
    for name, parameter in ours.named_parameters():
        scale = float(expected[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("family", ["llama3", "mistral", "mixtral"])
def test_cached_greedy_text_is_that_of_transformers(family: str) -> None:
    from dtt.generation import Sampling, stream_tokens

    theirs, ours, _ = pair(family)
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
