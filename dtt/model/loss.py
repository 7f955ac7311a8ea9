"""Cross-entropy of a large vocabulary without the logits of all tokens in memory."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sum_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Return the summed loss in nats (fp32, 0-dim) of targets [N] given hidden [N, dim].

    Targets equal to `ignored` count nothing. `head` is [vocabulary, dim].
    """
    logits = F.linear(hidden, head.to(hidden.dtype))
    return F.cross_entropy(logits.float(), targets, ignore_index=ignored, reduction="sum")
