"""Recomputing blocks, all or in part: the same gradients, with less in memory."""

from __future__ import annotations

import pytest
import torch
from test_decoder import decoder, random_tokens
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dtt.model.dropout import sample_keys
from dtt.model.recompute import Recompute

WAYS = [Recompute(), Recompute(every=2), Recompute(selective=True), Recompute(True, 2)]


def train(recompute: Recompute | None, **settings: float) -> tuple[list[Tensor], int]:
    """Return the loss and the gradients of a forward, and how many bytes it kept for them."""
    model = decoder(layers=4, **settings).train()
    model.recompute = recompute
    model.randomness.keys = sample_keys(0, range(2), torch.device("cpu"))
    parameters = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(random_tokens(2, 24)).float().square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], sum(
        kept.values()
    )


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("way", WAYS)
def test_recomputing_changes_nothing(way: Recompute, dropout: float) -> None:
    expected, _ = train(None, dropout=dropout)
    found, _ = train(way, dropout=dropout)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_more_is_recomputed_the_less_is_kept() -> None:
    every, second, none = (train(way)[1] for way in (Recompute(), Recompute(every=2), None))
    assert every < second < none and every < 0.5 * none


def test_products_are_not_computed_twice_when_they_are_kept() -> None:
    found = []
    for way in (None, Recompute(selective=True), Recompute()):
        with FlopCounterMode(display=False) as counter:
            train(way)
        found.append(counter.flop_counts["Global"][torch.ops.aten.mm])
    assert found[0] == found[1] < found[2]
