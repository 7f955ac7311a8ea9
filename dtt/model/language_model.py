"""What a model must be for dtt to train it: dtt's decoder, and causal models of `transformers`.

What trains, evaluates, generates and saves asks for nothing else. The names of parameters and
persistent buffers are those of checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dtt.config.model import AnyModel
from dtt.errors import ConfigError

Initial = Callable[[str, tuple[int, ...]], Tensor]
"""The first value (fp32, on the CPU) of a parameter or persistent buffer, by name and shape."""


class Memory(Protocol):
    """What a model remembers of the tokens so far, of rows that may begin with padding."""

    length: int
    """Columns that it has."""


class Randomness(Protocol):
    """Decides what is dropped in training."""

    rate: float
    keys: Tensor | None
    """[B] int64: of the rows, by `dtt.model.dropout.sample_keys`."""


class LanguageModel(nn.Module, ABC):
    """Tokens [B, T] to what comes next; made on the meta device, without memory."""

    settings: AnyModel
    compute_dtype: torch.dtype
    """Type of matrix products; parameters in training are fp32."""
    blocks: Iterable[nn.Module]
    """The transformer blocks that are here: what is compiled, gathered and recomputed."""
    block_prefix: str
    """What the names of the blocks' parameters begin with: Muon's are among them."""
    randomness: Randomness
    head_is_plain: bool = True
    """Whether logits are `hidden` times `head_weight`, and nothing else; if not, `hidden` returns
    logits."""

    isolates: bool | None = True
    """Whether places in documents keep documents apart; None: nobody has looked."""

    def cannot_isolate(self) -> ConfigError:
        """Return the error of a run whose documents must not see each other."""
        return ConfigError(
            "data.documents: this model cannot keep the documents of a window apart",
            "set data.documents join, or data.packing contiguous",
        )

    @property
    def has_head(self) -> bool:
        """Whether the end of the model is here, and not in another part of it."""
        return True

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """The output matrix [vocabulary, dim]."""

    def gathered_in(self) -> torch.dtype:
        """Return the type that divided parameters are gathered in."""
        return self.compute_dtype

    @abstractmethod
    def compute_in(self, dtype: torch.dtype) -> LanguageModel:
        """Set the type of matrix products; parameters stay as they are."""

    @abstractmethod
    def recompute_blocks(self, selective: bool, every: int) -> None:
        """Have every n-th block computed again in the backward pass (`dtt.model.recompute`)."""

    @abstractmethod
    def initial(self, seed: int) -> Initial:
        """Return what says how each tensor begins: a function of the seed and of its name, so that
        it does not matter who asks, and in which order."""

    @abstractmethod
    def reset(self) -> None:
        """Give the buffers that no checkpoint has their first values."""

    @abstractmethod
    def hidden(self, tokens: Tensor, positions: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return the normed state [B, T, dim] before the head, in the compute type.

        `positions` [B, T] are places in documents: a token sees back to place 0 of its own.
        """

    def scale_auxiliary(self, scale: Tensor | float) -> None:
        """Say what the loss is multiplied by in the backward passes to come."""

    def rebalance(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Do what is due after an optimizer step."""

    @abstractmethod
    def for_generation(self, device: torch.device, dtype: torch.dtype) -> LanguageModel:
        """Put the parameters on a device, in the type and order that generation reads fastest."""

    @abstractmethod
    def memory(self, padding: Tensor, capacity: int) -> Memory:
        """Return the empty memory of rows of which `padding` [B] columns come first and mean
        nothing, for at most `capacity` columns."""

    @abstractmethod
    def next_logits(self, tokens: Tensor, cache: Any) -> Tensor:
        """Return the logits [B, vocabulary] behind the last of `tokens`, which join the memory."""
