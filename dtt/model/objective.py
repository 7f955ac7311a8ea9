"""What training lowers and evaluation measures."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dtt.data.windows import IGNORED
from dtt.model.language_model import LanguageModel
from dtt.model.loss import sum_cross_entropy, sum_of_logits

Loss = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class Objective(nn.Module):
    """The loss in nats, summed over the targets that are not IGNORED.

    A module, since what divides or replicates a model does it around a module's forward. `loss` is
    the function of hidden [B, T, dim], head, targets and IGNORED; what divides the head replaces
    it.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model
        self.loss: Loss = sum_cross_entropy

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Return the loss (fp32, 0-dim) of targets [B, T] given tokens [B, T].

        `keys` [B] are the samples' keys of dropout, needed where there is any in training. A part
        of a model that is not the last returns the residual stream instead.
        """
        self.model.randomness.keys = keys
        hidden = self.model.hidden(tokens, positions)
        if not self.model.has_head:
            return hidden
        if not self.model.head_is_plain:
            return sum_of_logits(hidden, targets, IGNORED)
        return self.loss(hidden, self.model.head_weight, targets, IGNORED)
