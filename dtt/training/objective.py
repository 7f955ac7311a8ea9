"""What training lowers and evaluation measures."""

from __future__ import annotations

from torch import Tensor, nn

from dtt.data.windows import IGNORED
from dtt.model.decoder import Decoder
from dtt.model.loss import sum_cross_entropy


class Objective(nn.Module):
    """The loss in nats, summed over the targets that are not IGNORED.

    A module, since what divides or replicates a model does it around a module's forward.
    """

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the loss (fp32, 0-dim) of targets [B, T] given tokens [B, T]."""
        hidden = self.model.hidden(tokens, positions).flatten(0, 1)
        return sum_cross_entropy(hidden, self.model.head_weight, targets.flatten(), IGNORED)
