"""Muon: momentum whose update is orthogonalized, for the matrices of a network.

The mathematics is that of torch.optim.Muon with adjust_lr_fn="match_rms_adamw". The difference is
speed: matrices of equal shape go through Newton-Schulz as one batch, because a call per matrix is
bound by the overhead of launching it when the matrices are small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dtt.dist import local

# Coefficients of the quintic iteration, chosen by Jordan et al. for the steepest slope at zero.
A, B, C = 3.4445, -4.7750, 2.0315
SMALLEST_NORM = 1e-7

RMS_OF_ADAMW = 0.2  # of a typical AdamW update (Liu et al. 2025, arxiv.org/abs/2502.16982, 2.2)

# Matrices of this size keep the device busy alone; batching them would only cost memory and cache.
BATCH_ELEMENTS = 2**21


def zeropower(update: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest semi-orthogonal matrices to `update` [..., M, N], in bfloat16.

    By Newton-Schulz iteration, each matrix of the batch on its own (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon). Singular values above about 1% of the Frobenius norm land in
    about [0.7, 1.2] after 5 steps, which is enough for Muon; smaller ones grow 3.44-fold a step.
    """
    rows, columns = update.shape[-2:]
    if rows > columns:  # the Gram matrix is then the small one
        return zeropower(update.mT, steps).mT
    batch = update.reshape(-1, rows, columns).bfloat16()
    # The iteration converges where the largest singular value is at most about 1.
    batch = batch / batch.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram = batch @ batch.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        batch = torch.baddbmm(batch, polynomial, batch, beta=A)
    return batch.view(update.shape)


class Muon(torch.optim.Optimizer):
    """Step along the orthogonalized Nesterov momentum, with decoupled weight decay.

    For parameters [M, N], and stacks of such matrices [E, M, N]. Updates have the root mean square
    of AdamW's (0.2 x lr), so that one learning rate serves both (Liu et al. 2025,
    arxiv.org/abs/2502.16982). A parameter without gradient is left alone.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
        shares: Mapping[str, tuple[Any, ...]] | None = None,
    ) -> None:
        """`shares` says, by the names in `params`, how ranks divide a matrix, if they do: a tuple
        of `dtt.optim.divided.Shares`."""
        self._shares = shares or {}
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "ns_steps": ns_steps,
        }
        super().__init__(params, defaults)
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.ndim not in (2, 3):
                raise ValueError(f"Muon takes matrices, not a shape of {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step_group(group, parameters)
        return loss

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [local(self.state[p]["momentum_buffer"]) for p in parameters]
        gradients, values = [local(g) for g in gradients], [local(p) for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
        torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
        names = dict(zip(group["params"], group.get("param_names", ()), strict=False))
        shares = [self._shares.get(names.get(p, ""), ()) for p in parameters]
        for batch in _batches(values, shares):
            divided = shares[batch[0]]
            stack = torch.stack([updates[i] for i in batch])
            scale = RMS_OF_ADAMW * math.sqrt(max(_whole_shape(values[batch[0]], divided)))
            parts = _orthogonal(stack, divided, group["ns_steps"])
            for i, part in zip(batch, parts, strict=True):
                values[i].add_(part, alpha=-group["lr"] * scale)


def _orthogonal(updates: Tensor, shares: tuple[Any, ...], steps: int) -> Tensor:
    """Return `zeropower` of a stack of updates; where ranks divide them, this rank's share."""
    if not shares:
        return zeropower(updates, steps)
    from dtt.optim.divided import zeropower_divided

    return zeropower_divided(updates, shares, steps)


def _whole_shape(matrix: Tensor, shares: tuple[Any, ...]) -> list[int]:
    shape = list(matrix.shape[-2:])
    for each in shares:  # the last of those that divide the same dim knows all of it
        shape[each.dim] = sum(each.sizes)
    return shape


def _batches(values: list[Tensor], shares: list[tuple[Any, ...]]) -> Iterator[list[int]]:
    """Yield the indices of matrices that have the same shape and fit in one batch.

    Where ranks divide matrices, all of them yield the same, though shares may differ in size.
    """
    alike: dict[object, list[int]] = {}
    for i, value in enumerate(values):
        key = tuple(_whole_shape(value, shares[i])) if shares[i] else value.shape
        alike.setdefault((key, shares[i], value.device), []).append(i)
    for indices in alike.values():
        first = indices[0]
        size = math.prod(_whole_shape(values[first], shares[first]))
        sharers = math.prod(each.group.size() for each in shares[first])
        if values[first].ndim == 3:
            size *= len(values[first])
        length = sharers * max(1, BATCH_ELEMENTS // max(size, 1))
        for start in range(0, len(indices), length):
            yield indices[start : start + length]
