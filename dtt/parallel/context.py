"""Context parallelism: each rank has some tokens of every sequence, and keys and values of all.

A sequence is cut in 2 x ranks pieces, of which rank r has the r-th and the r-th from the end, since
later tokens see more (Brandon et al. 2023, arxiv.org/abs/2311.09431). Keys and values are gathered,
as in Llama 3 (Meta 2024, arxiv.org/abs/2407.21783, 3.3.2): with grouped queries they are small.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from dtt.model.attention import Attention, Cache, attend, visible
from dtt.model.decoder import Decoder
from dtt.model.dropout import AttentionDropout
from dtt.parallel.exchange import gather


@dataclass
class Share:
    """This rank's two pieces of sequences."""

    group: ProcessGroup
    order: Tensor | None = None
    """Where each token of the sequences under way is in what a gather gives."""

    def places(self) -> tuple[int, int]:
        """Return where its pieces are, counted in pieces."""
        rank = self.group.rank()
        return rank, 2 * self.group.size() - 1 - rank

    def columns(self, length: int, device: torch.device) -> Tensor:
        """Return which tokens of a sequence it has."""
        return _columns(length, self.group.rank(), self.group.size(), device)


# Made once: bringing them to a device makes the host wait for it.
@cache
def _columns(length: int, rank: int, ranks: int, device: torch.device) -> Tensor:
    pieces = torch.arange(length).chunk(2 * ranks)
    return torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]]).to(device)


@cache
def _order(length: int, ranks: int, device: torch.device) -> Tensor:
    cpu = torch.device("cpu")
    whole = torch.cat([_columns(length, rank, ranks, cpu) for rank in range(ranks)])
    return whole.argsort().to(device)


def divide_sequences(objective: nn.Module, model: Decoder, group: ProcessGroup) -> None:
    """Have `objective`, which is given whole sequences, compute this rank's share of them."""
    share = Share(group)
    columns = share.columns(model.settings.context, torch.device("cpu"))
    model.randomness.columns = model.randomness.attention_columns = columns
    masks = _Masks(share)
    model.mask_of = masks

    def before(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        tokens = given[0]
        length = tokens.shape[1] if model.embed is not None else named["targets"].shape[1]
        columns = share.columns(length, tokens.device)
        share.order = _order(length, group.size(), tokens.device)
        positions = named.get("positions")
        masks.documents = positions is not None
        if model.embed is not None:
            tokens = tokens[:, columns]
        named["targets"] = named["targets"][:, columns]
        named["positions"] = (
            columns.expand(len(tokens), -1) if positions is None else positions[:, columns]
        )
        return (tokens, *given[1:]), named

    objective.register_forward_pre_hook(before, with_kwargs=True)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = _Attend(share)


@dataclass
class _Masks:
    """What the tokens of each of this rank's pieces see of all tokens up to the piece's end."""

    share: Share
    documents: bool = False
    """Whether the positions that come are places in documents."""

    def __call__(
        self,
        length: int,
        device: torch.device,
        positions: Tensor | None,
        cache: Cache | None,
        window: int | None,
    ) -> list[Tensor] | None:
        assert positions is not None and cache is None
        whole = length * self.share.group.size()
        if not self.documents and (window is None or window >= whole):
            return None
        found = []
        pieces = self.share.columns(whole, device).chunk(2)
        for index, (rows, places) in enumerate(zip(pieces, positions.chunk(2, 1), strict=True)):
            stop = (self.share.places()[index] + 1) * len(rows)
            columns = torch.arange(stop, device=device)
            mask = visible(rows[:, None], columns, window).expand(len(positions), 1, -1, -1)
            if self.documents:
                mask = mask & (columns >= (rows - places)[:, None, :, None])
            found.append(mask)
        return found


@dataclass(frozen=True)
class _Attend:
    """Attention of this rank's tokens to all before."""

    share: Share

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        masks: list[Tensor] | None,
        dropout: AttentionDropout | None,
    ) -> Tensor:
        both = gather(torch.stack([k, v]), 3, self.share.group)
        assert self.share.order is not None
        k, v = both.index_select(3, self.share.order)
        found = []
        for index, queries in enumerate(q.chunk(2, 2)):
            stop = (self.share.places()[index] + 1) * queries.shape[2]
            mask = None if masks is None else masks[index]
            inner = dropout and replace(dropout, columns=dropout.columns.chunk(2)[index])
            found.append(attend(queries, k[:, :, :stop], v[:, :, :stop], mask, inner))
        return torch.cat(found, 2)
