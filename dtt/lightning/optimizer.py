"""dtt's optimizer as the one torch optimizer that Lightning's automatic optimization wants."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtt.metrics.meter import Meter
from dtt.optim.build import Optimizers


class OneOptimizer(torch.optim.Optimizer):
    """The torch optimizers of an `Optimizers`, as one.

    Its groups are theirs, the very same dictionaries, so that a learning rate set here or there is
    set in both. What it saves is by parameter name, as in dtt's checkpoints.
    """

    def __init__(self, optimizers: Optimizers, meter: Meter) -> None:
        self.optimizers, self._meter = optimizers, meter
        super().__init__(optimizers.param_groups, {})

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """What each part keeps of its parameters; assign to an entry's keys, not to entries."""
        found: defaultdict[Tensor, Any] = defaultdict(dict)
        for part in self.optimizers.parts:
            found.update(part.state)
        return found

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        """Nothing: torch.optim.Optimizer makes an empty state for itself, and the parts have it."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Compute the gradients by `closure`, update every parameter, return its result."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        with self._meter.part("optimizer"):
            self.optimizers.step()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        self.optimizers.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return the state by "<parameter>.<key>"; the tensors are the live ones."""
        return {"state": self.optimizers.named_state(), "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; CheckpointError if it is of another optimizer."""
        self.optimizers.load_named_state(state_dict["state"])
