"""What a model of `transformers` remembers of a text: its own cache, with dtt's padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HfMemory:
    """Keys and values of the tokens so far. Rows may begin with padding: `padding` [B] counts it,
    `length` columns are filled."""

    def __init__(self, cache: Any, padding: Tensor) -> None:
        self.cache, self.padding, self.length = cache, padding, 0
        # Asked once: each asking would make the host wait for the device.
        self._padded = bool(padding.any())

    def given(self, count: int, positions: bool) -> dict[str, Any]:
        """Return what a forward of the next `count` tokens takes beside them."""
        found: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        columns = torch.arange(self.length + count, device=self.padding.device)
        if self._padded:
            found["attention_mask"] = (columns >= self.padding[:, None]).long()
        if positions:
            found["position_ids"] = (columns[self.length :] - self.padding[:, None]).clamp(min=0)
        return found
