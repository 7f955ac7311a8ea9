"""Norms of each layer's gradients and weights: where a model learns, and where it breaks first.

The squares of a layer's norms add up to those of the whole model, in every layout of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dtt.dist import Runtime, local
from dtt.parallel.model import ParallelModel
from dtt.training.state import Run


def log_norms(run: Run, step: int, grad_norm: Tensor) -> None:
    """Write the norms of the gradients of `step`, before clipping, and of the weights that have
    them. `grad_norm` is the whole gradient's before clipping. All ranks must call it."""
    with run.meter.part("logging"):
        layers = layers_of(run.parameter_names)
        found = layer_norms(run.stepper.model, layers, run.runtime)
        clip = run.config.training.grad_clip
        if clip is not None:  # undo what clipping did
            found[0] /= (clip / (grad_norm.to(found.device) + 1e-6)).clamp(max=1.0)
        with run.meter.part("device"):
            gradients, weights = found.tolist()
        figures = {f"weight_grad_norm/{name}": v for name, v in zip(layers, gradients, strict=True)}
        figures |= {f"weight_norm/{name}": v for name, v in zip(layers, weights, strict=True)}
        if run.metrics is not None:
            run.metrics.write(step=step, **figures)
        run.track(figures, step)


def layers_of(names: Iterable[str]) -> list[str]:
    """Return the layers that parameters of these names belong to, in their order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


@torch.no_grad()
def layer_norms(model: ParallelModel, layers: list[str], runtime: Runtime) -> Tensor:
    """Return the norms [2, layers] of gradients and weights of the whole model's layers, each
    element counted once whatever the ranks divide; on this rank's device, which is not waited for.
    """
    places = {name: index for index, name in enumerate(layers)}
    squares = torch.zeros(2, len(layers), device=runtime.device)
    named = model.named_parameters()
    owned = [(places[name.rpartition(".")[0]], named[name]) for name in model.owned]
    for row, tensors in enumerate(
        (
            [(place, p.grad) for place, p in owned if p.grad is not None],
            owned,
        )
    ):
        if tensors:
            norms = torch._foreach_norm([local(tensor).float() for _, tensor in tensors])
            where = torch.tensor([place for place, _ in tensors], device=runtime.device)
            squares[row].index_add_(0, where, torch.stack(norms).to(runtime.device).square())
    if not model.is_whole:
        runtime.sum(squares)
    return squares.sqrt()
