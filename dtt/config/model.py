"""Settings of the model: dtt's decoder, or one of `transformers`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dtt.config.section import Section


class Learned(Section):
    """Learned absolute positions (GPT-2)."""

    name: Literal["learned"] = "learned"
    """Which positions."""


class NoPositions(Section):
    """No position information beyond the causal mask."""

    name: Literal["none"] = "none"
    """Which positions."""


class Rotary(Section):
    """Rotary positions (Su et al. 2021, arxiv.org/abs/2104.09864), scaled for longer contexts."""

    name: Literal["rotary"] = "rotary"
    """Which positions."""
    theta: float = Field(10_000.0, gt=0)
    """Base of the rotation frequencies."""
    scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    """How frequencies are stretched for contexts longer than `original_context`."""
    factor: float = Field(1.0, ge=1)
    """By how much the context is stretched (with a scaling)."""
    original_context: int = Field(8192, gt=0)
    """Context that the unscaled frequencies were made for, in tokens (with a scaling)."""
    low_freq_factor: float = Field(1.0, gt=0)
    """llama3: waves longer than original_context / this are stretched in full."""
    high_freq_factor: float = Field(4.0, gt=0)
    """llama3: waves shorter than original_context / this are left alone."""
    beta_fast: float = Field(32.0, gt=0)
    """yarn: frequencies that turn more often than this over the original context are left alone."""
    beta_slow: float = Field(1.0, gt=0)
    """yarn: frequencies that turn less often than this are stretched in full."""


Positions = Annotated[Rotary | Learned | NoPositions, Field(discriminator="name")]


class Experts(Section):
    """A mixture of experts: MLPs of which each token passes a few (Shazeer et al. 2017,
    arxiv.org/abs/1701.06538), chosen by a router, with none dropped for want of room."""

    number: int = Field(gt=1)
    """Experts in a block."""
    active: int = Field(2, gt=0)
    """Experts that a token passes, chosen by the router; at most `number`."""
    hidden: int | None = Field(None, gt=0)
    """Width of an expert, a multiple of 8; null: that of the dense MLP."""
    shared: int = Field(0, ge=0)
    """Experts that every token passes beside these, computed as one MLP of `shared` x the width."""
    every: int = Field(1, gt=0)
    """Each n-th block has experts, the others the dense MLP; 1: all of them."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of the router's logits: softmax over all experts, or sigmoid of each."""
    normalize: bool = True
    """Weights of a token's experts add up to one; of one active expert it is then always one."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """What spreads tokens over experts: an auxiliary loss, a bias for choosing only, or nothing."""
    balance_weight: float = Field(0.01, ge=0)
    """loss: weight of the auxiliary loss beside the cross-entropy, for each block."""
    bias_rate: float = Field(0.001, ge=0)
    """bias: what an expert's bias rises or falls by in an optimizer step."""

    @model_validator(mode="after")
    def _enough(self) -> Experts:
        if self.active > self.number:
            raise ValueError(f"active ({self.active}) must be at most number ({self.number})")
        return self


class Model(Section):
    """dtt's decoder: GPT-2, Llama, Mixtral and Qwen3 are settings of it."""

    name: Literal["decoder"] = "decoder"
    """Whose code the model is: dtt's, or (hf) that of `transformers`."""
    preset: str | None = None
    """Start from the model settings of this preset (`dtt config presets` lists them)."""
    dim: int = Field(128, gt=0)
    """Width of the residual stream."""
    layers: int = Field(4, gt=0)
    """Number of transformer blocks."""
    heads: int = Field(4, gt=0)
    """Number of query heads."""
    kv_heads: int | None = Field(None, gt=0)
    """Number of key/value heads (grouped-query attention); null: as many as heads."""
    head_dim: int | None = Field(None, gt=0)
    """Width of a head; null: dim / heads."""
    hidden: int | None = Field(None, gt=0)
    """Width of the MLP; null: 4 dim, or 8/3 dim rounded up to a multiple of 64 for swiglu."""
    experts: Experts | None = None
    """Mixture of experts in the place of the MLP; null: none."""
    # Two stories of the default corpus and its tokenizer fill it to 97%.
    context: int = Field(288, gt=0)
    """Longest sequence, in tokens; training windows have this length."""
    vocab_size: int | None = Field(None, gt=0)
    """Rows of the embedding; null: the tokenizer's size. Larger is padding, smaller is an error."""
    positions: Positions = Rotary()
    """How the model knows where a token stands."""
    norm: Literal["rmsnorm", "layernorm"] = "layernorm"
    """Normalisation before attention, before the MLP and before the head."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the variance in a norm."""
    activation: Literal["gelu", "gelu_tanh", "swiglu", "relu2"] = "relu2"
    """MLP non-linearity; swiglu adds a gate matrix."""
    bias: bool = False
    """Biases in linear layers and in LayerNorm."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys (Qwen3)."""
    tied_head: bool = False
    """The output matrix is the embedding matrix."""
    window: int | None = Field(None, gt=0)
    """Sliding window: tokens that each token sees, itself included; null: all before it."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of activations dropped in training."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights."""

    @property
    def mlp_width(self) -> int:
        """The width of the MLP that the settings ask for."""
        if self.hidden is not None:
            return self.hidden
        if self.activation == "swiglu":
            return -(-self.dim * 8 // 3 // 64) * 64
        return 4 * self.dim

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, data: Any) -> Any:
        # In a file or on a command line this is done before; here for `Config(model={...})`.
        if isinstance(data, dict) and isinstance(data.get("preset"), str):
            from dtt.config.layers import preset_model

            return preset_model(data["preset"]) | data
        return data

    @model_validator(mode="after")
    def _heads_fit(self) -> Model:
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(f"dim ({self.dim}) must be divisible by heads ({self.heads})")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be divisible by kv_heads ({self.kv_heads})"
            )
        width = self.head_dim or self.dim // self.heads
        if isinstance(self.positions, Rotary) and width % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {width}")
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> Model:
        if self.experts is None:
            return self
        widths = {"dim": self.dim, "hidden": self.hidden or 8}
        if self.experts.hidden is not None:
            widths = {"dim": self.dim, "experts.hidden": self.experts.hidden}
        for name, width in widths.items():
            if width % 8:  # grouped_mm reads rows of whole 16 bytes
                raise ValueError(f"{name} ({width}) must be a multiple of 8 with experts")
        if self.experts.every > self.layers:
            raise ValueError(
                f"experts.every ({self.experts.every}) is more than layers ({self.layers}): "
                "no block would have experts"
            )
        return self


class HfModel(Section):
    """A causal language model of `transformers`, by its own code (needs dtt[hf])."""

    name: Literal["hf"] = "hf"
    """Whose code the model is: dtt's, or (hf) that of `transformers`."""
    architecture: str | None = Field(None, min_length=1)
    """A model_type of `transformers` (gpt2, llama, ...), or a folder or ORG/NAME[@REVISION] whose
    config.json describes the model; null: that of `init_from`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the architecture by its own names, as in config.json: {hidden_size: 256}."""
    context: int = Field(288, gt=0)
    """Longest sequence, in tokens; training windows have this length."""
    vocab_size: int | None = Field(None, gt=0)
    """Rows of the embedding; null: the tokenizer's size, or what the folder of `init_from` has."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of activations dropped in training, wherever the architecture drops any."""

    @property
    def experts(self) -> None:
        """dtt balances experts in its own decoder only; a model with others is refused."""

    @property
    def layers(self) -> int:
        """Number of transformer blocks, once the settings are complete."""
        return int(self.settings["num_hidden_layers"])

    @property
    def dim(self) -> int:
        """Width of the residual stream, once the settings are complete."""
        return int(self.settings["hidden_size"])

    @property
    def heads(self) -> int:
        """Number of query heads, once the settings are complete."""
        return int(self.settings["num_attention_heads"])


AnyModel = Model | HfModel
"""What a run can train."""
