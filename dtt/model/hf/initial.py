"""How the weights of a model of `transformers` begin: as its own code says, one at a time.

`transformers` fills a model in one go, from one generator: who has a part of it, or asks in another
order, gets other numbers. Here all parameters but one are without memory while its code runs, and
the generator has the seed of that one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dtt.data.order import mix
from dtt.errors import ConfigError


class Initial:
    """The first values of a model's parameters and persistent buffers, by name."""

    def __init__(self, make: Callable[[], Any], seed: int) -> None:
        """`make` gives the model of `transformers`, its parameters on the meta device."""
        self._make, self._seed = make, seed
        self._twin: Any = None

    @torch.no_grad()
    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor (fp32, on the CPU) as the model's own code begins it."""
        if self._twin is None:
            self._twin = self._make()
        path, _, leaf = name.rpartition(".")
        owner: nn.Module = self._twin.get_submodule(path)
        if leaf in owner._buffers:
            buffer = owner._buffers[leaf]
            assert buffer is not None
            return buffer.clone()
        without = owner._parameters[leaf]
        # What no code fills stays NaN.
        value = nn.Parameter(torch.full(shape, float("nan")), requires_grad=False)
        owner._parameters[leaf] = value
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(mix(self._seed, 0, zlib.crc32(name.encode())) >> 1)
                for part, module in self._inside_out(path):
                    part._init_weights(module)
        finally:
            owner._parameters[leaf] = without
        if not bool(value.isfinite().all()):
            raise ConfigError(
                f"model.architecture: transformers does not say how {name} begins",
                "start from weights: init_from",
            )
        return value.detach()

    def _inside_out(self, path: str) -> Iterator[tuple[Any, nn.Module]]:
        """Yield a module and those that it is in, each with the model whose code fills it."""
        modules, parts = [self._twin], [self._twin]
        for name in path.split("."):
            modules.append(getattr(modules[-1], name))
            parts.append(modules[-1] if hasattr(modules[-1], "_init_weights") else parts[-1])
        return zip(reversed(parts), reversed(modules), strict=True)
