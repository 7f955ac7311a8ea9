"""A causal language model of `transformers`, trained by dtt: its code, its names, its cache.

Parameters stay in fp32 and products are computed in another type under autocast, as its own Trainer
does. What dtt changes is the head: it hands on what it is given, so that the loss is computed from
that and the head's weight without the logits of all tokens in memory. A model that does something
else to its logits (scales or caps them, adds a bias) is noticed, and then they are all made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtt.config.model import HfModel
from dtt.errors import ConfigError
from dtt.model.hf.attention import use_blocks
from dtt.model.hf.initial import Initial
from dtt.model.hf.memory import HfMemory
from dtt.model.hf.quiet import quiet
from dtt.model.hf.settings import config_of
from dtt.model.language_model import LanguageModel


@dataclass
class Drops:
    """What the dropout of `transformers`, which draws from torch's generator, is seeded with."""

    rate: float
    keys: Tensor | None = None


class HfCausalModel(LanguageModel):
    """The model that complete settings describe; its parameters are on the meta device."""

    settings: HfModel
    blocks: list[nn.Module]
    whole: Any
    """The model of `transformers`. Its parts are ours, under their names; it is no part."""

    def __init__(self, settings: HfModel) -> None:
        super().__init__()
        self.settings = settings
        self.compute_dtype = torch.float32
        self.randomness = Drops(settings.dropout)
        self.isolates = None
        whole = without_memory(settings)
        self.__dict__["whole"] = whole
        for name, child in whole.named_children():
            self.add_module(name, child)
        takes = inspect.signature(whole.forward).parameters
        self.takes_positions = "position_ids" in takes
        self._takes_cache = "past_key_values" in takes
        self._entered: Tensor | None = None
        self._take_head(whole)
        self._refuse_odd(whole)
        self.blocks = _blocks(whole, settings)
        names = {module: name for name, module in self.named_modules()}
        self.block_prefix = names[self.blocks[0]].rpartition(".")[0] + "."
        self._first = {name: buffer.clone() for name, buffer in _passing_buffers(self)}

    def _take_head(self, whole: Any) -> None:
        """Have the head hand on what enters it; a tied one has no weight of its own from now on."""
        embed, head = whole.get_input_embeddings(), whole.get_output_embeddings()
        if not isinstance(head, nn.Linear) or not isinstance(embed, nn.Embedding):
            kinds = f"{type(embed).__name__} and {type(head).__name__}"
            raise self._odd(f"an embedding and a head that dtt does not know ({kinds})")
        self._ends: list[Any] = [embed, head]  # in a list, since they are parts already
        self._tied = head.weight is embed.weight
        self._bias = head.bias is not None
        self.head_is_plain = not self._bias
        if self._tied:
            head.register_parameter("weight", None)
        head.forward = self._enter  # type: ignore[method-assign, assignment]

    def _enter(self, hidden: Tensor) -> Tensor:
        if self.head_is_plain:
            self._entered = hidden
            return hidden
        return F.linear(hidden, self.head_weight, self._ends[1].bias)

    def _refuse_odd(self, whole: Any) -> None:
        if not self._takes_cache or not _has_cache(whole.config):
            raise self._odd("no cache of keys and values")
        if whole._parameters or any(buffer is not None for buffer in whole._buffers.values()):
            raise self._odd("parameters outside of its parts")
        named = list(self.named_parameters(remove_duplicate=False))
        if len(named) != len({id(parameter) for _, parameter in named}):
            raise self._odd("weights that share memory, beside a tied head")

    def _odd(self, what: str) -> ConfigError:
        return ConfigError(
            f"model.architecture: dtt cannot train {self.settings.architecture}, which has {what}",
            "take another architecture, or dtt's own decoder",
        )

    @property
    def head_weight(self) -> Tensor:
        weight: Tensor = self._ends[0 if self._tied else 1].weight
        return weight

    def gathered_in(self) -> torch.dtype:
        return torch.float32  # autocast decides for each operation

    def compute_in(self, dtype: torch.dtype) -> HfCausalModel:
        self.compute_dtype = dtype
        return self

    def train(self, mode: bool = True) -> HfCausalModel:
        super().train(mode)
        self.whole.training = mode
        return self

    def recompute_blocks(self, selective: bool, every: int) -> None:
        """Have all blocks computed again in the backward pass, by the model's own code."""
        if not self.whole.supports_gradient_checkpointing:
            raise ConfigError(
                f"training.gradient_checkpointing: {self.settings.architecture} cannot do it",
                "leave it off",
            )
        self.whole.activation_checkpointing_enable({"use_reentrant": False})

    def initial(self, seed: int) -> Callable[[str, tuple[int, ...]], Tensor]:
        return Initial(partial(without_memory, self.settings), seed)

    def reset(self) -> None:
        """Restore the buffers that no checkpoint has, such as tables of positions."""
        device = self.head_weight.device
        for name, first in self._first.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, first.to(device, copy=True))

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, cache: Any = None) -> Tensor:
        given: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            given = cache.given(tokens.shape[1], self.takes_positions)
        elif positions is not None:
            if not self.takes_positions or self.isolates is False:
                raise self.cannot_isolate()
            given["position_ids"] = positions
        if self.training and self.randomness.rate:
            self._seed_dropout(len(tokens))
        found = self._called(tokens, given)
        if cache is not None:
            cache.length += tokens.shape[1]
        return found.to(self.compute_dtype)

    def _called(self, tokens: Tensor, given: dict[str, Any]) -> Tensor:
        """Return what enters the head, or logits where the head is not all that makes them."""
        device = tokens.device.type
        wide = self.compute_dtype == torch.float32
        with torch.autocast(device, None if wide else self.compute_dtype, enabled=not wide):
            found: Tensor = self.whole(input_ids=tokens, **given).logits
        if self.head_is_plain and found is not self._entered:
            self.head_is_plain = False
            self._entered = None
            if given["use_cache"]:
                raise RuntimeError("the head was not examined before generation")
            return self._called(tokens, given)
        self._entered = None
        return found

    def _seed_dropout(self, rows: int) -> None:
        """Make what is dropped a function of the seed, the step and the first sample of a forward:
        the same again after a restart, and for as many ranks as there are."""
        keys = self.randomness.keys
        if keys is None or len(keys) != rows:
            raise ValueError(f"dropout in {rows} rows needs their keys: set randomness.keys")
        torch.manual_seed(int(keys[0]) & (1 << 63) - 1)

    def for_generation(self, device: torch.device, dtype: torch.dtype) -> HfCausalModel:
        self.compute_in(dtype).to(device).eval()
        for parameter in self.parameters():
            if parameter.ndim > 1:  # norms and biases stay as they are, as under autocast
                parameter.data = parameter.data.to(dtype)
        return self

    def memory(self, padding: Tensor, capacity: int) -> HfMemory:
        from transformers import DynamicCache

        self.examine_head(padding.device)
        return HfMemory(DynamicCache(config=self.whole.config), padding)

    @torch.no_grad()
    def examine_head(self, device: torch.device) -> None:
        """Find out whether logits are a product with the head and nothing else."""
        if self.head_is_plain:
            self._called(torch.zeros(1, 2, dtype=torch.int64, device=device), {"use_cache": False})

    def next_logits(self, tokens: Tensor, cache: Any) -> Tensor:
        found = self.hidden(tokens, cache=cache)[:, -1]
        return F.linear(found, self.head_weight.to(found.dtype)) if self.head_is_plain else found

    def sizes_of_products(self) -> tuple[int, int]:
        """Return the weights that a token is multiplied with, and the width of all heads of a
        block together: what a step's operations follow from."""
        blocks = sum(p.numel() for block in self.blocks for p in block.parameters() if p.ndim == 2)
        config = self.whole.config
        width = getattr(config, "head_dim", None) or config.hidden_size // self.settings.heads
        return blocks + self.head_weight.numel(), width * self.settings.heads


def _blocks(whole: Any, settings: HfModel) -> list[nn.Module]:
    """Return the decoder layers, by what `transformers` says must not be split, or as the list of
    so many."""
    kinds = set(whole._no_split_modules or ())
    found = [module for module in whole.modules() if type(module).__name__ in kinds]
    if len(found) == settings.layers:
        return found
    for module in whole.modules():
        if isinstance(module, nn.ModuleList) and len(module) == settings.layers:
            return list(module)
    raise ConfigError(
        f"model.architecture: dtt does not find the {settings.layers} layers of "
        f"{settings.architecture}",
        "take another architecture, or dtt's own decoder",
    )


def _has_cache(config: Any) -> bool:
    from transformers import DynamicCache

    try:
        return DynamicCache(config=config).get_seq_length() == 0
    except ValueError:  # no layer of it attends
        return False


def _passing_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that are not saved, by name."""
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None:
                yield f"{path}.{name}".lstrip("."), buffer


def without_memory(settings: HfModel) -> Any:
    """Return the model of `transformers`, its parameters on the meta device and its buffers, which
    follow from the settings, as they are."""
    config = config_of(settings)
    import transformers

    kind: Any = transformers.AutoModelForCausalLM
    try:
        with quiet(), _parameters_without_memory():
            made = kind.from_config(config, dtype=torch.float32)
    except Exception as error:  # code of many authors
        text = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model.architecture: transformers cannot make {settings.architecture}: {text}",
            "correct model.settings, or take another architecture",
        ) from error
    use_blocks(made)
    return made


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    register = nn.Module.register_parameter

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = emptied  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
