"""Tensor parallelism: each rank has some heads, some hidden units, some rows of the vocabulary.

As Megatron-LM divides a block (Shoeybi et al. 2019, arxiv.org/abs/1909.08053), with the residual
stream divided by tokens between the products (Korthikanti et al. 2022, arxiv.org/abs/2205.05198):
tokens are gathered before attention and MLP, and what comes out is summed and divided again. Plain
tensors and hooks: the model's own code runs on the shares.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from dtt.model.attention import Attention
from dtt.model.decoder import Block, Decoder
from dtt.model.layers import MLP
from dtt.parallel.exchange import gather, scatter_sum
from dtt.parallel.part import Part, Range

PLAN = {
    "embed.weight": "rows",
    "head.weight": "rows",
    "blocks.*.attention.qkv.*": "rows",
    "blocks.*.attention.out.weight": "columns",
    "blocks.*.attention.out.bias": "first",
    "blocks.*.mlp.up.*": "rows",
    "blocks.*.mlp.gate.*": "rows",
    "blocks.*.mlp.down.weight": "columns",
    "blocks.*.mlp.down.bias": "first",
}
"""How a parameter is divided: by rows (outputs), by columns (inputs), or only the first rank has
it: a bias that is added to a sum over ranks. Others are whole everywhere, and their gradients are
summed over the ranks, each of which sees some of the tokens or heads."""


def divide_tensors(model: Decoder, group: ProcessGroup) -> tuple[dict[str, Part], list[str]]:
    """Leave this rank its share of the matrices, and hook up the exchanges.

    Returns what it has of each parameter, and those of which all ranks have all.
    """
    parts: dict[str, Part] = {}
    for name, parameter in list(model.named_parameters()):
        where, _, leaf = name.rpartition(".")
        owner = model.get_submodule(where)
        part = _part(name, parameter, model, group)
        if part is None:
            owner.register_parameter(leaf, None)
            continue
        parts[name] = part
        if not part.is_all:
            setattr(owner, leaf, nn.Parameter(part.take(parameter.detach())))
    for block in model.blocks:
        if not isinstance(block, Block):
            continue
        _exchange_around(block.attention, group)
        if isinstance(block.mlp, MLP):  # experts see each token alone
            _exchange_around(block.mlp, group)
    for module in model.modules():
        if isinstance(module, Attention):
            q, k, v = (size // group.size() for size in module.split)
            module.split = q, k, v
    _divide_dropout(model, group)
    if model.embed is None:
        model.sequence_shares = group.size()
    else:
        first = parts["embed.weight"].ranges[0][0][0]
        weight = model.get_parameter("embed.weight")
        model.embed = DividedEmbedding(weight, first, group)
    if model.position_embed is not None:
        model.position_embed.register_forward_hook(
            lambda module, given, out: out.chunk(group.size(), -2)[group.rank()]
        )
    return parts, [name for name in parts if _how(name) is None]


def _divide_dropout(model: Decoder, group: ProcessGroup) -> None:
    """Say which columns of the residual stream, and which heads, this rank has."""
    drawn, settings = model.randomness, model.settings
    columns = torch.arange(settings.context) if drawn.columns is None else drawn.columns
    drawn.attention_columns = columns
    drawn.columns = columns.chunk(group.size())[group.rank()]
    drawn.first_head = settings.heads // group.size() * group.rank()


def _how(name: str) -> str | None:
    return next((how for pattern, how in PLAN.items() if fnmatchcase(name, pattern)), None)


def _part(name: str, parameter: Tensor, model: Decoder, group: ProcessGroup) -> Part | None:
    """Return what this rank has of a parameter; None for a bias that another one adds."""
    rank, ranks = group.rank(), group.size()
    how = _how(name)
    whole = Part.all_of(tuple(parameter.shape))
    if how == "rows":
        sizes = [len(parameter)]
        if ".qkv." in name:  # three matrices in one: each is divided by heads
            owner = model.get_submodule(name.partition(".qkv.")[0])
            assert isinstance(owner, Attention)
            sizes = list(owner.split)
        return Part(whole.shape, (shares_of(sizes, ranks, rank), *whole.ranges[1:]))
    if how == "columns":
        return Part(whole.shape, (whole.ranges[0], shares_of([parameter.shape[1]], ranks, rank)))
    if how == "first":
        return whole if rank == 0 else None
    return Part(whole.shape, whole.ranges, owned=rank == 0)


def shares_of(sizes: list[int], ranks: int, rank: int) -> tuple[Range, ...]:
    """Return a rank's share of each of several pieces of a dim that follow each other."""
    found, before = [], 0
    for size in sizes:
        found.append((before + size * rank // ranks, before + size * (rank + 1) // ranks))
        before += size
    return tuple(found)


def _exchange_around(module: nn.Module, group: ProcessGroup) -> None:
    """Have all tokens gathered before `module`, whose ranks' outputs are summed and divided."""

    def before(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return gather(given[0], 1, group), *given[1:]

    module.register_forward_pre_hook(before)
    module.register_forward_hook(lambda module, given, out: scatter_sum(out, 1, group))


class DividedEmbedding(nn.Module):
    """An embedding of which this rank has the rows from `first` on."""

    def __init__(self, weight: nn.Parameter, first: int, group: ProcessGroup) -> None:
        super().__init__()
        self.weight, self.first, self.group = weight, first, group

    def forward(self, tokens: Tensor) -> Tensor:
        """Return this rank's share [B, T / ranks, dim] of the tokens' rows."""
        index = tokens - self.first
        inside = (index >= 0) & (index < len(self.weight))
        rows = F.embedding(index.where(inside, 0), self.weight) * inside.unsqueeze(-1)
        return scatter_sum(rows, 1, self.group)
