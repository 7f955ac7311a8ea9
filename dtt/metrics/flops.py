"""Floating-point operations of training, counted from the settings of the model."""

from __future__ import annotations

from dataclasses import dataclass

from dtt.config.model import Model

BACKWARD = 2
"""A matrix product has two in its backward pass, as large as itself: for inputs and for weights."""


@dataclass(frozen=True)
class TokenFlops:
    """Operations of one token's forward and backward pass; a multiplication and an addition are
    two. Recomputing in the backward pass is not counted, nor is what is no matrix product."""

    matrices: float
    """Of the model's matrices, the head's too; of experts those that a token passes."""
    attention: float
    """Of queries with keys and weights with values, as many as a token sees: those before it, in
    its window. Documents that do not see each other are not taken out."""
    square_attention: float
    """The same if each token saw the whole context: what formulae such as 6 N + 12 L H Q T (PaLM,
    arxiv.org/abs/2204.02311, appendix B) count, though a causal model needs half of it."""

    @property
    def total(self) -> float:
        """What a step needs: the figure behind dtt's MFU."""
        return self.matrices + self.attention

    @property
    def palm(self) -> float:
        """The figure to compare with MFU that others publish."""
        return self.matrices + self.square_attention


def training_flops(model: Model) -> TokenFlops:
    """Return the operations per token of a training step on sequences of `model.context`.

    Within 1% of what PyTorch's counter finds for the matrices, and attention counted by hand.
    """
    assert model.vocab_size is not None, "the vocabulary is resolved before a model is built"
    width = model.head_dim or model.dim // model.heads
    inner, kv_inner = width * model.heads, width * (model.kv_heads or model.heads)
    attention = model.dim * (inner + 2 * kv_inner) + inner * model.dim
    weights = sum(attention + _mlp(model, layer) for layer in range(model.layers))
    weights += model.dim * model.vocab_size
    return flops_of(weights, inner, model.layers, model.context, model.window)


def flops_of(
    weights: int, inner: int, layers: int, context: int, window: int | None = None
) -> TokenFlops:
    """Return the operations per token of a training step of any decoder: a token is multiplied with
    `weights` matrix elements, and heads have a width of `inner` together in each layer."""
    scores = 4 * inner * layers  # two products for each token seen
    times = 1 + BACKWARD
    return TokenFlops(
        matrices=times * 2 * weights,
        attention=times * scores * _mean_seen(context, window),
        square_attention=times * scores * context,
    )


def _mlp(model: Model, layer: int) -> int:
    """Weights of a block's MLP, or of its experts, that one token is multiplied with."""
    matrices = 3 if model.activation == "swiglu" else 2
    experts = model.experts
    if experts is None or (layer + 1) % experts.every:
        return matrices * model.dim * model.mlp_width
    passed = experts.active + experts.shared
    hidden = experts.hidden or model.mlp_width
    return model.dim * (passed * matrices * hidden + experts.number)  # and the router


def _mean_seen(context: int, window: int | None) -> float:
    """Return how many tokens one sees, itself included, in the mean over a sequence."""
    most = min(window or context, context)
    return (most * (most + 1) / 2 + (context - most) * most) / context
