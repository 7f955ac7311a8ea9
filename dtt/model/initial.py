"""Initial weights: each tensor from a seed of its own, whoever draws it, in whatever order.

So they do not depend on how ranks divide a model, and none of them needs all of it at once.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from dtt.config.model import Model
from dtt.data.order import mix

RESIDUAL_OUTPUTS = (
    *("attention.out.weight", "mlp.down.weight"),
    *("mlp.experts.down", "mlp.shared.down.weight"),  # of experts
)


def initial(settings: Model, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a parameter or buffer (fp32, on the CPU) of the decoder that `settings` describe.

    Normal with init_std, residual outputs scaled by 1/sqrt(2 layers) (GPT-2), norms one, biases
    zero.
    """
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
    scale = (2 * settings.layers) ** -0.5 if name.endswith(RESIDUAL_OUTPUTS) else 1.0
    generator = torch.Generator().manual_seed(mix(seed, 0, zlib.crc32(name.encode())) >> 1)
    return torch.empty(shape).normal_(0.0, settings.init_std * scale, generator=generator)
