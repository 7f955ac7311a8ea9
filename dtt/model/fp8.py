"""Matrix products in 8-bit floating point, for GPUs that multiply it twice as fast as bf16.

One scale per tensor, found anew each time: e4m3 for activations and weights, e5m2 for gradients
(Micikevicius et al. 2022, arxiv.org/abs/2209.05433). Weights stay in fp32, sums are wide.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtt.errors import ConfigError
from dtt.model.layers import Linear

STEP = 16
"""Sizes of a product must be multiples of this."""
CAPABILITY = (8, 9)
"""The first GPUs that have it: Ada and Hopper."""


def refuse_without_fp8(device: torch.device) -> None:
    """Raise ConfigError for a device that does not multiply fp8."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise ConfigError(
            f"training.fp8: {device.type} does not multiply fp8",
            "set training.fp8 to false, or use a GPU of compute capability 8.9 or more (H100, L4)",
        )


def use_fp8(blocks: nn.Module) -> None:
    """Have the linear maps in `blocks` whose sizes allow it multiply in fp8."""
    for module in blocks.modules():
        if isinstance(module, Linear) and not any(size % STEP for size in module.weight.shape):
            module.product = linear_fp8


def linear_fp8(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x [..., K] W^T + b in the type of x, as F.linear but for the rounding to fp8.

    Where a size is no multiple of STEP it is F.linear.
    """
    rows = x.flatten(0, -2)
    if any(size % STEP for size in (*rows.shape, len(weight))):
        return F.linear(x, weight, bias)
    y: Tensor = _Product.apply(rows, weight)  # type: ignore[no-untyped-call]
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, weight8 = _rounded(x, torch.float8_e4m3fn), _rounded(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(*x8, *weight8)
        ctx.weight_dtype = weight.dtype
        return _multiply(x8, (weight8[0].t(), weight8[1]), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, x_scale, weight, weight_scale = ctx.saved_tensors
        rounded, scale = _rounded(grad, torch.float8_e5m2)
        dx = _multiply((rounded, scale), (_by_columns(weight), weight_scale), grad.dtype)
        across = rounded.t().contiguous()
        dweight = _multiply((across, scale), (_by_columns(x), x_scale), ctx.weight_dtype)
        return dx, dweight


def _rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x in fp8 and what it is to be multiplied by."""
    scale = x.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


def _by_columns(x: Tensor) -> Tensor:
    """The order that the second factor must have in memory."""
    return x.t().contiguous().t()


def _multiply(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    product: Tensor = torch._scaled_mm(a[0], b[0], a[1], b[1], out_dtype=dtype)
    return product
