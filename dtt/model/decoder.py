"""The decoder: GPT-2, Llama, Mixtral, Qwen3 and dtt's own default are settings of this one model.

It is single-device code: no rank, mesh or process group in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtt.config.model import Learned, Model, Rotary
from dtt.model.attention import Attention, Cache, causal_mask
from dtt.model.dropout import NO_DROPOUT, BlockDropout, Dropout, Randomness, drop
from dtt.model.experts import MoE, Router, move_biases
from dtt.model.initial import initial
from dtt.model.language_model import Initial, LanguageModel
from dtt.model.layers import MLP, LayerNorm, Linear, RMSNorm
from dtt.model.positions import rotation_table
from dtt.model.recompute import Recompute

MaskOf = Callable[[int, torch.device, Tensor | None, Cache | None, int | None], Any]


def _norm(settings: Model) -> nn.Module:
    if settings.norm == "layernorm":
        return LayerNorm(settings.dim, settings.norm_eps, bias=settings.bias)
    return RMSNorm(settings.dim, settings.norm_eps)


def _mlp(settings: Model, layer: int) -> nn.Module:
    """Return the MLP of a block, or the experts in its place, as Qwen3's decoder_sparse_step."""
    dense, experts = settings.mlp_width, settings.experts
    if experts is None or (layer + 1) % experts.every:
        return MLP(settings.dim, dense, settings.activation, settings.bias)
    return MoE(settings.dim, experts.hidden or dense, settings.activation, experts)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), where `mlp` may be a mixture of experts."""

    def __init__(self, settings: Model, layer: int) -> None:
        super().__init__()
        self.attention_norm = _norm(settings)
        self.attention = Attention(settings, layer)
        self.mlp_norm = _norm(settings)
        self.mlp = _mlp(settings, layer)
        self.compute_dtype = torch.float32

    def forward(
        self,
        x: Tensor,
        table: Tensor | None,
        cache: Cache | None,
        mask: Tensor | None,
        dropout: BlockDropout = NO_DROPOUT,
    ) -> Tensor:
        """Add to the residual stream x [B, T, dim], which is fp32 whatever the compute type."""
        inner = self.attention_norm(x).to(self.compute_dtype)
        attended = self.attention(inner, table, cache, mask, dropout.weights)
        x = x + drop(attended, dropout.attention)
        return x + drop(self.mlp(self.mlp_norm(x).to(self.compute_dtype)), dropout.mlp)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the forward in place, as any module's; set the compute type before."""
        if isinstance(self.mlp, MoE) and self.compute_dtype != torch.bfloat16:
            self.mlp.experts.keep_out_of_graphs()
        super().compile(*args, **kwargs)


class Absent(nn.Module):
    """A block that another part of the model has."""

    def forward(self, x: Tensor, *inputs: Any) -> Tensor:
        return x


class Decoder(LanguageModel):
    """Tokens [B, T] to logits [B, T, vocabulary].

    Matrix products are computed in `compute_dtype`, the residual stream in fp32, as under autocast:
    a bf16 residual stream is no faster and gives gradients that are 15% off (docs/log.md).
    Parts: embed, blocks, norm, head (absent when it is the embedding). `keep_part` leaves a model
    some of them. For what divides sequences: `mask_of` says what each token sees, and
    `sequence_shares` of what part of a sequence the residual stream that comes in is.
    With dropout, each forward in training needs keys in `randomness`.
    """

    settings: Model
    blocks: nn.ModuleList
    block_prefix = "blocks."
    randomness: Randomness

    def __init__(self, settings: Model) -> None:
        super().__init__()
        if settings.vocab_size is None:
            raise ValueError("vocab_size must be resolved before a model is built")
        self.settings = settings
        self.compute_dtype = torch.float32
        self.recompute: Recompute | None = None
        self.mask_of: MaskOf = causal_mask
        self.sequence_shares = 1
        self.randomness = Randomness(settings.dropout, settings.layers)
        self.embed: nn.Module | None = nn.Embedding(settings.vocab_size, settings.dim)
        learned = isinstance(settings.positions, Learned)
        self.position_embed = nn.Embedding(settings.context, settings.dim) if learned else None
        self.blocks = nn.ModuleList(Block(settings, layer) for layer in range(settings.layers))
        self.norm: nn.Module | None = _norm(settings)
        self.head = (
            None if settings.tied_head else Linear(settings.dim, settings.vocab_size, bias=False)
        )
        self._table: Tensor | None = None

    def recompute_blocks(self, selective: bool, every: int) -> None:
        self.recompute = Recompute(selective, every)

    def compute_in(self, dtype: torch.dtype) -> Decoder:
        """Set the type of matrix products; parameters stay as they are."""
        self.compute_dtype = dtype
        for block in self.blocks:
            if isinstance(block, Block):
                block.compute_dtype = dtype
        return self

    def for_generation(self, device: torch.device, dtype: torch.dtype) -> Decoder:
        """Put the parameters on a device, in the type and order that generation reads fastest."""
        routers = [m for m in self.modules() if isinstance(m, Router)]
        exact = [{n: t.clone() for n, t in r.state_dict().items()} for r in routers]
        self.compute_in(dtype).to(device=device, dtype=dtype).eval()
        for module in self.modules():
            if isinstance(module, LayerNorm | RMSNorm | Router):
                module.float()  # as the residual stream that it reads
        for router, state in zip(routers, exact, strict=True):
            router.load_state_dict(state)  # rounded, it would send tokens elsewhere
        if device.type == "cpu" and dtype == torch.float32:
            # A product of one row with a matrix in this order takes 0.6 to 0.7 of the time.
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    parameter.data = parameter.data.t().contiguous().t()
        return self

    def rotate_by(self, table: Tensor) -> None:
        """Use these cos and sin [2, T, head width / 2] of positions and not the exact ones."""
        self._table = table

    @property
    def has_head(self) -> bool:
        return self.norm is not None

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [vocabulary, dim]."""
        found = self.embed if self.head is None else self.head
        assert found is not None, "a part without a head"
        weight: Tensor = found.weight  # type: ignore[assignment]
        return weight

    def initial(self, seed: int) -> Initial:
        return partial(initial, self.settings, seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter and buffer with what `initial` gives."""
        made = self.initial(seed)
        for name, tensor in self.state_dict().items():
            tensor.copy_(made(name, tuple(tensor.shape)))
        self.reset()

    def reset(self) -> None:
        """Give the buffers that no checkpoint has their first values."""
        for experts in self.experts():
            experts.scale.fill_(1.0)
            experts.router.counts.zero_()

    def experts(self) -> Iterator[MoE]:
        """The mixtures of experts of the blocks that are here."""
        if self.settings.experts is None:
            return iter(())
        return (module for module in self.modules() if isinstance(module, MoE))

    def scale_auxiliary(self, scale: Tensor | float) -> None:
        """Say what the loss is multiplied by in the backward passes to come, for the auxiliary
        loss of experts to be multiplied by it too; 1 until it is said."""
        for experts in self.experts():
            experts.scale.fill_(scale)

    def rebalance(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Move the biases that balance experts, given the tokens since the last time; no-op for
        models without them. Call it after each optimizer step, on all ranks that have the blocks.
        """
        move_biases([m.router for m in self.experts() if m.router.bias is not None], sum_over_ranks)

    def keep_part(self, blocks: range, first: bool, last: bool) -> Decoder:
        """Keep some blocks, with the embedding if they are the first and the head if the last.

        What is left has the names that it had. `hidden` of a part that is not the first takes the
        residual stream [B, T, dim] of the part before in the place of tokens, and of one that is
        not the last returns it.
        """
        for index in range(len(self.blocks)):
            if index not in blocks:
                self.blocks[index] = Absent()
        if not first:
            self.embed = self.position_embed = None
        if not last:
            self.norm = self.head = None
        return self

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Return the normed state [B, T, dim] before the head.

        `positions` [B, T] are places in documents: a token sees back to place 0 of its own, so
        that documents in one row do not see each other. Without them a row is one text.
        """
        length, device = tokens.shape[1] * self.sequence_shares, tokens.device
        mask = self.mask_of(length, device, positions, cache, self.settings.window)
        if cache is not None and positions is None:
            positions = cache.positions(length)
        first, inside = self._dropouts(tokens)
        x = tokens
        if self.embed is not None:
            x = drop(self._embedded(self.embed, tokens, positions), first)
        rotation = self._rotation(length, positions, device)
        for index, (block, dropout) in enumerate(zip(self.blocks, inside, strict=True)):
            inputs = (x, rotation, cache, mask, dropout)
            again = self.recompute if self.training else None
            x = block(*inputs) if again is None else again(index, block, inputs)
        if cache is not None:
            cache.length += length
        return x if self.norm is None else self.norm(x).to(self.compute_dtype)

    def _embedded(self, embed: nn.Module, tokens: Tensor, positions: Tensor | None) -> Tensor:
        x = embed(tokens)
        if self.position_embed is not None:
            if positions is None:
                positions = torch.arange(tokens.shape[1], device=tokens.device)
            x = x + self.position_embed(positions)
        return x.float()

    def _dropouts(self, tokens: Tensor) -> tuple[Dropout | None, list[BlockDropout]]:
        if not (self.training and self.settings.dropout):
            return None, [NO_DROPOUT] * len(self.blocks)
        return self.randomness.dropouts(len(tokens), tokens.shape[1])

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Return logits [B, T, vocabulary] in the compute type."""
        x = self.hidden(tokens, positions, cache)
        return F.linear(x, self.head_weight.to(x.dtype))

    def memory(self, padding: Tensor, capacity: int) -> Cache:
        return Cache(self.settings, len(padding), capacity, padding, self.compute_dtype)

    def next_logits(self, tokens: Tensor, cache: Cache) -> Tensor:
        x = self.hidden(tokens, cache=cache)[:, -1]
        return F.linear(x, self.head_weight.to(x.dtype))

    def _rotation(
        self, length: int, positions: Tensor | None, device: torch.device
    ) -> Tensor | None:
        settings = self.settings
        if not isinstance(settings.positions, Rotary):
            return None
        if self._table is None or self._table.device != device:
            width = settings.head_dim or settings.dim // settings.heads
            self._table = rotation_table(settings.positions, width, settings.context).to(device)
        if positions is None:
            return self._table[:, :length]
        return self._table[:, positions].unsqueeze(2)  # [2, B, 1, T, width / 2]


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def count_active_parameters(model: nn.Module) -> int:
    """Return the number of parameters that one token passes: all but its inactive experts'."""
    idle = sum(m.inactive_parameters() for m in model.modules() if isinstance(m, MoE))
    return count_parameters(model) - idle
