"""A model made ready for generation computes the same as it was."""

import pytest
import torch
from test_decoder import STYLES, decoder, random_tokens


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_the_logits_are_those_of_the_model(style, dtype, tolerance):
    settings, tokens = STYLES[style] | {"init_std": 0.08}, random_tokens(2, 24)
    with torch.no_grad():
        expected = decoder(**settings)(tokens)
        model = decoder(**settings).for_generation(torch.device("cpu"), dtype)
        found = model(tokens).float()
    assert float((found - expected).norm() / expected.norm()) < tolerance
    kinds = {p.dtype for n, p in model.named_parameters() if "norm" in n}
    assert kinds == {torch.float32}
    assert all(p.dtype == dtype for n, p in model.named_parameters() if "norm" not in n)
