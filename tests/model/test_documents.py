"""Documents in one row that do not see each other: the same as each in a row of its own."""

import itertools

import pytest
import torch
from test_decoder import STYLES, decoder, random_tokens

from dtt.model.dropout import sample_keys
from dtt.model.objective import Objective

LENGTHS = (9, 1, 4, 10)


def separate_and_together(model, keys=None) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, targets = random_tokens(1, 24), random_tokens(1, 24).flip(1)
    edges = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    parts = [
        Objective(model)(tokens[:, a:b], targets[:, a:b], keys=keys)
        for a, b in itertools.pairwise(edges)
    ]
    return torch.stack(parts).sum(), Objective(model)(tokens, targets, positions, keys)


@pytest.mark.parametrize("style", STYLES)
def test_isolated_documents_have_the_loss_of_separate_ones(style):
    model = decoder(**(STYLES[style] | {"init_std": 0.2}))
    apart, together = separate_and_together(model)
    assert float(((apart - together).abs() / apart).detach()) < 1e-6
    gradients = []
    for loss in (apart, together):
        model.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


def test_documents_that_are_joined_see_each_other():
    model = decoder(init_std=0.2)
    tokens, targets = random_tokens(1, 24), random_tokens(1, 24).flip(1)
    _apart, together = separate_and_together(model)
    assert abs((Objective(model)(tokens, targets) - together).item()) > 1e-2


def test_isolated_documents_with_dropout_take_the_same_mask():
    """Dropout asks for attention in blocks: at almost zero it must be the same function."""
    model = decoder(init_std=0.2, dropout=1e-7).train()
    keys = sample_keys(0, range(1), torch.device("cpu"))
    apart, together = separate_and_together(model, keys)
    assert float(((apart - together).abs() / apart).detach()) < 1e-5
