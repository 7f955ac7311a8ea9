"""The models that are measured: the same settings for dtt, for the reference and for nanoGPT."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dtt.config.model import Experts, Learned, Model
from dtt.metrics.flops import training_flops
from dtt.model.decoder import Decoder, count_parameters


@dataclass(frozen=True)
class Shape:
    """A GPT-2 style decoder (learned positions, LayerNorm, GELU, tied head) and its batch."""

    layers: int
    dim: int
    heads: int
    context: int
    batch: int
    vocab: int
    bias: bool
    experts: int = 0
    """In the place of each MLP, of which a token passes two; 0: none."""

    def settings(self) -> Model:
        """Return dtt's settings of this model."""
        return Model(
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            context=self.context,
            vocab_size=self.vocab,
            positions=Learned(),
            norm="layernorm",
            activation="gelu",
            bias=self.bias,
            tied_head=True,
            experts=Experts(number=self.experts) if self.experts else None,
        )

    @property
    def tokens(self) -> int:
        """Target tokens of a step."""
        return self.batch * self.context

    def parameters(self) -> int:
        """Return the number of parameters, the position embedding included."""
        with torch.device("meta"):
            return count_parameters(Decoder(self.settings()))

    def flops(self) -> float:
        """Return the floating-point operations of a training step per token, as published MFU has
        them: all of the attention counts, although a causal one needs half of it."""
        return training_flops(self.settings()).palm


SHAPES = {
    "tiny-0.8m": Shape(4, 128, 4, 64, 12, 65, bias=False),
    "nanogpt-10m": Shape(6, 384, 6, 256, 16, 65, bias=False),
    "gpt2-124m": Shape(12, 768, 12, 1024, 2, 50257, bias=True),
}
QUICK = Shape(2, 32, 2, 16, 4, 65, bias=False)
"""Instead of any of them with --quick."""
