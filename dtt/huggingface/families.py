"""The stock architectures of `transformers` that dtt's decoder can be, in literal tables.

A family says which settings it has, what its config.json and its tensors call them, and where
its blocks are. Export, `init_from` and the proof of both read the same tables. Adding an
architecture is adding a `Family` to FAMILIES.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Names = Mapping[str, tuple[str, ...]]

WITHOUT_GATE = ("gelu_tanh", "gelu", "relu2")
ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "relu2": "relu2"}
"""Our activations to those of `transformers`; swiglu is silu with a gate."""


@dataclass(frozen=True)
class Family:
    """One architecture of `transformers`."""

    model_type: str
    """What config.json calls it."""
    architecture: str
    """The class."""
    summary: str
    """What it has, in words."""
    needs: Mapping[str, tuple[Any, ...]]
    """Values that it can have of what `choice.facts` says of a model."""
    keys: Mapping[str, str]
    """Settings of `Model` that config.json has as they are, and their names there."""
    names: Names
    """Our tensors to theirs, without `.weight` or `.bias` where all of a module is meant. {n} is
    the block, {e} an expert. Several are rows of one matrix here, and experts a stack."""
    blocks: str
    """The module of block {n}."""
    attention: str
    """The module of the attention in a block."""
    mlp: str = "mlp"
    norm: str = "model.norm"
    """The module of the final norm."""
    rotary: str | None = "model.rotary_emb"
    """The module that makes cos and sin of positions."""
    prefix: str = "model."
    """What names begin with, but for the head's; older folders may lack it."""
    transposed: bool = False
    """Linear maps in the blocks are [in, out] (GPT-2's Conv1D)."""
    biased: tuple[str, ...] = ()
    """Modules that have a bias whatever the settings; where ours has none, theirs is zero."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a key of config.json means where it is absent."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys of config.json that change what is computed, and the values that are dtt's; the first is
    written, and what an absent one means."""


LINEAR_NAMES = {
    "embed": ("model.embed_tokens",),
    "head": ("lm_head",),
    "norm": ("model.norm",),
    "blocks.{n}.attention_norm": ("model.layers.{n}.input_layernorm",),
    "blocks.{n}.attention.qkv": (
        "model.layers.{n}.self_attn.q_proj",
        "model.layers.{n}.self_attn.k_proj",
        "model.layers.{n}.self_attn.v_proj",
    ),
    "blocks.{n}.attention.out": ("model.layers.{n}.self_attn.o_proj",),
    "blocks.{n}.mlp_norm": ("model.layers.{n}.post_attention_layernorm",),
}
GATED_NAMES = LINEAR_NAMES | {
    "blocks.{n}.mlp.gate": ("model.layers.{n}.mlp.gate_proj",),
    "blocks.{n}.mlp.up": ("model.layers.{n}.mlp.up_proj",),
    "blocks.{n}.mlp.down": ("model.layers.{n}.mlp.down_proj",),
}
QWEN3_NAMES = GATED_NAMES | {
    "blocks.{n}.attention.q_norm": ("model.layers.{n}.self_attn.q_norm",),
    "blocks.{n}.attention.k_norm": ("model.layers.{n}.self_attn.k_norm",),
}
KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "hidden": "intermediate_size",
    "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tied_head": "tie_word_embeddings",
    "init_std": "initializer_range",
}
HEAD_KEYS = KEYS | {"head_dim": "head_dim"}
ROTARY_DEFAULTS = {"tie_word_embeddings": False, "rope_theta": 10_000.0, "rms_norm_eps": 1e-6}
GATED_NEEDS: dict[str, tuple[Any, ...]] = {
    "positions": ("rotary",),
    "norm": ("rmsnorm",),
    "activation": ("swiglu",),
    "bias": (False,),
    "qk_norm": (False,),
    "window": (False,),
    "experts": ("none",),
}
MOE_NEEDS: dict[str, tuple[Any, ...]] = GATED_NEEDS | {
    "window": (False, True),
    "experts": ("all blocks",),
    "experts.scoring": ("softmax",),
    "experts.balance": ("loss", "none"),
    "experts.shared": (0,),
    "experts.normalize": (True,),
}

GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    "GPT-2 (positions learned, norm layernorm, activation gelu_tanh, gelu or relu2)",
    needs={
        "positions": ("learned",),
        "norm": ("layernorm",),
        "activation": WITHOUT_GATE,
        "bias": (True, False),
        "qk_norm": (False,),
        "kv_heads": ("as heads",),
        "head_dim": ("dim / heads",),
        "window": (False,),
        "experts": ("none",),
    },
    keys={
        "vocab_size": "vocab_size",
        "dim": "n_embd",
        "layers": "n_layer",
        "heads": "n_head",
        "hidden": "n_inner",
        "context": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "tied_head": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    names={
        "embed": ("transformer.wte",),
        "position_embed": ("transformer.wpe",),
        "head": ("lm_head",),
        "norm": ("transformer.ln_f",),
        "blocks.{n}.attention_norm": ("transformer.h.{n}.ln_1",),
        "blocks.{n}.attention.qkv": ("transformer.h.{n}.attn.c_attn",),
        "blocks.{n}.attention.out": ("transformer.h.{n}.attn.c_proj",),
        "blocks.{n}.mlp_norm": ("transformer.h.{n}.ln_2",),
        "blocks.{n}.mlp.up": ("transformer.h.{n}.mlp.c_fc",),
        "blocks.{n}.mlp.down": ("transformer.h.{n}.mlp.c_proj",),
    },
    blocks="transformer.h.{n}",
    attention="attn",
    norm="transformer.ln_f",
    rotary=None,
    prefix="transformer.",
    transposed=True,
    biased=("norm", "attention_norm", "mlp_norm", "qkv", "out", "up", "down"),
    defaults={"tie_word_embeddings": True, "n_inner": None, "layer_norm_epsilon": 1e-5},
    fixed={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False, True),
        "add_cross_attention": (False,),
    },
)
STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    "StarCoder2 (positions rotary, norm layernorm, activation gelu_tanh, gelu or relu2)",
    needs={
        "positions": ("rotary",),
        "norm": ("layernorm",),
        "activation": WITHOUT_GATE,
        "bias": (True, False),
        "qk_norm": (False,),
        "head_dim": ("dim / heads",),
        "window": (False, True),
        "experts": ("none",),
    },
    keys=KEYS | {"norm_eps": "norm_epsilon", "bias": "use_bias"},
    names=LINEAR_NAMES
    | {
        "blocks.{n}.mlp.up": ("model.layers.{n}.mlp.c_fc",),
        "blocks.{n}.mlp.down": ("model.layers.{n}.mlp.c_proj",),
    },
    blocks="model.layers.{n}",
    attention="self_attn",
    biased=("norm", "attention_norm", "mlp_norm"),
    defaults=ROTARY_DEFAULTS
    | {"tie_word_embeddings": True, "norm_epsilon": 1e-5, "use_bias": True},
)
LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    "Llama (positions rotary, norm rmsnorm, activation swiglu)",
    needs=GATED_NEEDS | {"bias": (False, True), "dim": ("a multiple of heads",)},
    keys=HEAD_KEYS | {"bias": "attention_bias"},
    names=GATED_NAMES,
    blocks="model.layers.{n}",
    attention="self_attn",
    defaults=ROTARY_DEFAULTS | {"attention_bias": False},
    fixed={"hidden_act": ("silu",)},
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    "Mistral (as Llama, with a window and no biases)",
    needs=GATED_NEEDS | {"window": (True, False)},
    keys=HEAD_KEYS,
    names=GATED_NAMES,
    blocks="model.layers.{n}",
    attention="self_attn",
    defaults=ROTARY_DEFAULTS,
    fixed={"hidden_act": ("silu",)},
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    "Qwen3 (as Llama, with qk_norm and no biases)",
    needs=GATED_NEEDS | {"qk_norm": (True,), "window": (False, True)},
    keys=HEAD_KEYS,
    names=QWEN3_NAMES,
    blocks="model.layers.{n}",
    attention="self_attn",
    defaults=ROTARY_DEFAULTS | {"head_dim": 128},
    fixed={"hidden_act": ("silu",), "attention_bias": (False,)},
)
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    "Mixtral (as Mistral, with experts in all blocks, softmax, normalize, no shared expert, "
    "not balanced by bias)",
    needs=MOE_NEEDS,
    keys=HEAD_KEYS,
    names=LINEAR_NAMES
    | {
        "blocks.{n}.mlp.router": ("model.layers.{n}.block_sparse_moe.gate",),
        "blocks.{n}.mlp.experts.gate": ("model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight",),
        "blocks.{n}.mlp.experts.up": ("model.layers.{n}.block_sparse_moe.experts.{e}.w3.weight",),
        "blocks.{n}.mlp.experts.down": ("model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight",),
    },
    blocks="model.layers.{n}",
    attention="self_attn",
    defaults=ROTARY_DEFAULTS | {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
    fixed={"hidden_act": ("silu",)},
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    "Qwen3-MoE (as Qwen3, with experts, softmax, no shared expert, not balanced by bias)",
    needs=MOE_NEEDS
    | {
        "qk_norm": (True,),
        "experts": ("all blocks", "some blocks"),
        "experts.normalize": (True, False),
    },
    keys=HEAD_KEYS,
    names=QWEN3_NAMES
    | {
        "blocks.{n}.mlp.router": ("model.layers.{n}.mlp.gate",),
        "blocks.{n}.mlp.experts.gate": ("model.layers.{n}.mlp.experts.{e}.gate_proj.weight",),
        "blocks.{n}.mlp.experts.up": ("model.layers.{n}.mlp.experts.{e}.up_proj.weight",),
        "blocks.{n}.mlp.experts.down": ("model.layers.{n}.mlp.experts.{e}.down_proj.weight",),
    },
    blocks="model.layers.{n}",
    attention="self_attn",
    defaults=ROTARY_DEFAULTS,
    fixed={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_only_layers": ([], None)},
)
# In the order in which they are tried: a model without a window is rather a Llama than a Mistral.
FAMILIES = {f.model_type: f for f in (GPT2, STARCODER2, LLAMA, MISTRAL, QWEN3, MIXTRAL, QWEN3_MOE)}
