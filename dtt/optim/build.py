"""From settings and named parameters to one optimizer; its state by name; gradient clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dtt.config.optim import Adam, AdamW, Optimizer, Sgd
from dtt.config.optim import Muon as MuonSettings
from dtt.dist import local
from dtt.errors import CheckpointError, ConfigError
from dtt.optim.muon import Muon

Named = list[tuple[str, Parameter]]
Shares = Mapping[str, tuple[Any, ...]]

# A router classifies tokens, as the head does: an orthogonal update would move the scores of all
# experts by as much, also of those that had hardly any token to learn from.
ROUTER = ".router.weight"

FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}  # where torch has one kernel for the whole update


class Optimizers:
    """Torch optimizers that own disjoint parameters and share one learning rate, as one.

    `param_groups`, `step` and `zero_grad` are those of a torch optimizer, which is all that
    torch.amp.GradScaler asks for.
    """

    def __init__(self, parts: list[torch.optim.Optimizer], peak_lr: float) -> None:
        self.parts = parts
        self.peak_lr = peak_lr

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of every part."""
        return [group for part in self.parts for group in part.param_groups]

    def set_lr(self, factor: float) -> None:
        """Use `factor` x the peak learning rate from the next step on, in every group."""
        for group in self.param_groups:
            group["lr"] = self.peak_lr * factor

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Drop the gradients (they become None, so that a parameter without one is skipped)."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def named_state(self) -> dict[str, Tensor]:
        """Return the state as "<parameter name>.<state key>" -> tensor.

        The tensors are the live ones: copy them before the next step. A parameter that never had
        a gradient has no state, and momentum-free SGD has none at all.
        """
        return {
            f"{name}.{key}": value
            for part in self.parts
            for name, parameter in _named(part)
            for key, value in part.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def load_named_state(self, state: dict[str, Tensor]) -> None:
        """Take over tensors like those that `named_state` gave, on whatever device they are: they
        are the optimizer's own from now on.

        The next steps are then bitwise those of the optimizer they came from. Tensors that do not
        belong to this optimizer and these parameters are a CheckpointError, and change nothing.
        """
        entries: dict[str, dict[str, Tensor]] = {}
        for full_name, tensor in state.items():
            name, _, key = full_name.rpartition(".")
            entries.setdefault(name, {})[key] = tensor
        self._check(entries)
        for part in self.parts:
            packed = part.state_dict()
            packed["state"] = {
                index: {key: tensor.detach() for key, tensor in entries[name].items()}
                for index, (name, _) in enumerate(_named(part))
                if name in entries
            }
            part.load_state_dict(packed)  # puts each tensor where its optimizer wants it

    def _check(self, entries: dict[str, dict[str, Tensor]]) -> None:
        owners = {name: (part, p) for part in self.parts for name, p in _named(part)}
        for name, tensors in entries.items():
            if name not in owners:
                raise _foreign(f"state of {name!r}, which the model does not have or train")
            part, parameter = owners[name]
            expected = _state_keys(part)
            if set(tensors) != expected:
                raise _foreign(
                    f"{', '.join(sorted(tensors))} for {name!r}, where"
                    f" {type(part).__name__} keeps {', '.join(sorted(expected)) or 'nothing'}"
                )
            for key, tensor in tensors.items():
                shape = () if key == "step" else tuple(parameter.shape)
                if tuple(tensor.shape) != shape:
                    raise _foreign(
                        f"a shape of {tuple(tensor.shape)} for '{name}.{key}', not {shape}"
                    )


def build_optimizer(
    settings: Optimizer,
    named_parameters: Iterable[tuple[str, Parameter]],
    block_prefix: str = "blocks.",
    shares: Shares | None = None,
) -> Optimizers:
    """Return the optimizer of `settings` over the parameters that require a gradient.

    Weight decay acts on matrices (two dimensions or more) only, never on norms or biases. Muon
    takes the matrices [M, N] and stacks of matrices [E, M, N] whose name starts with
    `block_prefix`, but for routers of experts, AdamW the rest. A tied parameter counts once, by
    its first name. Build it after the parameters are on their device; the learning rate is the
    peak until `set_lr`. `shares` says by name how ranks divide matrices (dtt.optim.divided).
    """
    first_names: dict[Parameter, str] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            first_names.setdefault(parameter, name)
    named = [(name, parameter) for parameter, name in first_names.items()]
    return Optimizers(
        BUILDERS[settings.name](settings, named, block_prefix, shares or {}), settings.lr
    )


def clip_gradients(
    parameters: Iterable[Parameter], max_norm: float | None, norm: Tensor | None = None
) -> Tensor:
    """Scale the gradients so that their global norm is at most `max_norm`; None only measures.

    Returns the norm before the scaling, a 0-dim tensor on the gradients' device that an
    accelerator is not waited for. A norm that is not finite is returned as it is, and leaves the
    gradients unusable: look at it before the step. Equal to torch.nn.utils.clip_grad_norm_, bit
    for bit. Where ranks divide the gradients, `norm` is that of all their shares together.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if norm is None:
        norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm is None:
        return norm
    scale = max_norm / (norm + 1e-6)
    # Reading a number is free on a CPU, and there most of the time went into multiplying by 1.
    if norm.device.type == "cpu" and scale >= 1:
        return norm
    mine = [local(gradient) for gradient in gradients]
    torch._foreach_mul_(mine, scale.clamp(max=1.0).to(mine[0].device))
    return norm


def _adam(
    settings: AdamW | Adam, named: Named, block_prefix: str, shares: Shares
) -> list[torch.optim.Optimizer]:
    variant = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return [
        variant(
            _decay_groups(named, settings.weight_decay),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            fused=_fused(named),
        )
    ]


def _sgd(
    settings: Sgd, named: Named, block_prefix: str, shares: Shares
) -> list[torch.optim.Optimizer]:
    if settings.nesterov and settings.momentum == 0:
        raise ConfigError(
            "optimizer.nesterov needs momentum, and optimizer.momentum is 0",
            "set optimizer.momentum above 0 or optimizer.nesterov to false",
        )
    return [
        torch.optim.SGD(
            _decay_groups(named, settings.weight_decay),
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            # The fused kernel of SGD does not know parameters that ranks divide.
            fused=_fused(named) and not any(hasattr(p, "to_local") for _, p in named),
        )
    ]


def _muon(
    settings: MuonSettings, named: Named, block_prefix: str, shares: Shares
) -> list[torch.optim.Optimizer]:
    matrices = [
        (n, p)
        for n, p in named
        if n.startswith(block_prefix) and p.ndim in (2, 3) and not n.endswith(ROUTER)
    ]
    taken = {name for name, _ in matrices}
    rest = [(name, parameter) for name, parameter in named if name not in taken]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(
            Muon(
                matrices,
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                momentum=settings.momentum,
                ns_steps=settings.ns_steps,
                shares=shares,
            )
        )
    if rest:
        adamw = AdamW(
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            eps=settings.eps,
        )
        parts += _adam(adamw, rest, block_prefix, shares)
    return parts


BUILDERS: dict[str, Callable[[Any, Named, str, Shares], list[torch.optim.Optimizer]]] = {
    "adamw": _adam,
    "adam": _adam,
    "sgd": _sgd,
    "muon": _muon,
}


def _decay_groups(named: Named, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [(name, parameter) for name, parameter in named if parameter.ndim >= 2]
    vectors = [(name, parameter) for name, parameter in named if parameter.ndim < 2]
    groups = [(matrices, weight_decay), (vectors, 0.0)]
    return [{"params": members, "weight_decay": decay} for members, decay in groups if members]


def _fused(named: Named) -> bool:
    return all(p.device.type in FUSED_DEVICES and p.is_floating_point() for _, p in named)


def _named(part: torch.optim.Optimizer) -> Named:
    """Return the parameters of `part` with the names it was given, in its own order."""
    return [
        pair
        for group in part.param_groups
        for pair in zip(group["param_names"], group["params"], strict=True)
    ]


def _state_keys(part: torch.optim.Optimizer) -> set[str]:
    if isinstance(part, torch.optim.Adam):  # AdamW too
        return {"step", "exp_avg", "exp_avg_sq"}
    return {"momentum_buffer"} if part.defaults["momentum"] else set()


def _foreign(found: str) -> CheckpointError:
    return CheckpointError(
        f"the optimizer state in the checkpoint has {found}",
        "continue with the model and optimizer settings that it was saved with, or start afresh",
    )
