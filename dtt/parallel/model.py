"""A model as the ranks of a layout have it: what each of them calls, has, and counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dtt.config.model import AnyModel
from dtt.config.parallel import AXES
from dtt.dist import Runtime, local
from dtt.model.objective import Objective
from dtt.optim.divided import Shares
from dtt.parallel.exchange import sum_gradients
from dtt.parallel.layout import Layout
from dtt.parallel.mesh import Mesh
from dtt.parallel.part import Part, share_of
from dtt.parallel.pipeline import Pipeline

Rows = dict[str, Tensor]

COPIES = ("expert", "replicate", "context")
"""Axes whose ranks have the same parameters, but for..."""
EXPERT_COPIES = ("replicate", "context")
"""...experts."""
STAGE = tuple(name for name in AXES if name != "pipeline")
"""Axes whose ranks have the same blocks."""


class Reader(Protocol):
    """Whole tensors, of which parts can be read."""

    def read(self, name: str, part: Part) -> Tensor:
        """A part of a tensor, on the CPU."""


@dataclass
class ParallelModel:
    """One rank's view of a model that all ranks of a layout train."""

    stages: list[Objective]
    """This rank's parts of the model: one, but for a pipeline with several stages a rank."""
    mesh: Mesh
    called: nn.Module | None = None
    """What a forward calls, where it is not the first stage: its replicated form."""
    pipeline: Pipeline | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    """What this rank has of the parameters that the model's own division divides or copies; of
    these parts fully_shard may divide the rows further."""
    experts: set[str] = field(default_factory=set)
    """Those of which ranks along the axis `expert` have different ones."""
    summed: list[tuple[ProcessGroup, list[str]]] = field(default_factory=list)
    """Parameters of which each rank of a group has a copy and a share of the gradient."""

    @classmethod
    def alone(cls, objective: Objective, runtime: Runtime) -> ParallelModel:
        """Return the view of a rank that has no others."""
        return cls([objective], Mesh(Layout(), runtime))

    @property
    def layout(self) -> Layout:
        return self.mesh.layout

    @property
    def settings(self) -> AnyModel:
        return self.stages[0].model.settings

    @property
    def data_rank(self) -> int:
        """Which share of the sequences this rank has."""
        return self.layout.data_rank(self.mesh.runtime.rank)

    @property
    def is_whole(self) -> bool:
        """Whether this rank can compute the model without the others."""
        return self.layout.is_plain

    @cached_property
    def counts_loss(self) -> bool:
        """Whether the losses that this rank returns count; others return the same or none."""
        is_last = self.pipeline is None or self.pipeline.is_last
        return self.mesh.is_first("tensor") and is_last

    @cached_property
    def counts_data(self) -> bool:
        """Whether this rank is the first of those that have the same sequences."""
        return self.mesh.is_first("pipeline", "context", "tensor")

    def named_parameters(self) -> dict[str, Any]:
        """Return this rank's parameters, or what it has of them, by their names in the model."""
        return {n: p for stage in self.stages for n, p in stage.model.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        """Return this rank's parameters and persistent buffers by name."""
        return {n: t for stage in self.stages for n, t in stage.model.state_dict().items()}

    def part(self, name: str, tensor: Tensor) -> Part:
        """Return which part of the whole a tensor of this rank is.

        `tensor` is the parameter of that name, or has its shape, as its gradient has.
        """
        copies = EXPERT_COPIES if name in self.experts else COPIES
        part = self.parts.get(name) or Part.all_of(
            tuple(tensor.shape), self.mesh.is_first("tensor")
        )
        part = replace(part, owned=part.owned and self.mesh.is_first(*copies))
        if isinstance(tensor, DTensor):
            rows = share_of(part.local_shape[0], self.layout.shard, self.mesh.place["shard"])
            return part.narrow(0, *rows)
        return replace(part, owned=part.owned and self.mesh.is_first("shard"))

    @cached_property
    def owned(self) -> list[str]:
        """Names of the parameters of which this rank's elements are its to count, so that ranks
        that divide a model count each once; all of them where it has the model whole."""
        named = self.named_parameters().items()
        return [n for n, p in named if self.is_whole or self.part(n, p).owned]

    def shares(self) -> dict[str, tuple[Shares, ...]]:
        """Return by name how ranks divide a matrix, the last division first."""
        found: dict[str, tuple[Shares, ...]] = {}
        for name, parameter in self.named_parameters().items():
            divided = []
            if isinstance(parameter, DTensor):
                group = self.mesh.group("shard")
                rows = [
                    share_of(len(parameter), group.size(), rank) for rank in range(group.size())
                ]
                divided.append(Shares(group, 0, tuple(b - a for a, b in rows)))
            part = self.parts.get(name)
            if part is not None and part.local_shape != part.shape:
                group = self.mesh.group("tensor")
                dim = next(d for d, size in enumerate(part.shape) if part.local_shape[d] != size)
                divided.append(Shares(group, dim, (part.local_shape[dim],) * group.size()))
            if divided and parameter.ndim == 2:
                found[name] = tuple(divided)
        return found

    def train(self, tokens: Tensor, given: Rows, scale: Tensor | float, forwards: int) -> Tensor:
        """Go forward and backward with the loss times `scale`; return the detached loss.

        `given` has what else an Objective takes, by name, all with as many rows as `tokens`. They
        go through in so many forwards, of which the last sums the gradients over ranks.
        """
        if isinstance(self.called, DistributedDataParallel):
            scale = scale * self.layout.ranks  # it averages over ranks, where others add up
        for stage in self.stages:
            stage.model.scale_auxiliary(scale)
        if self.pipeline is not None:
            loss = self.pipeline.train(tokens, given, scale)
        else:
            loss = self._accumulate(tokens, given, scale, forwards)
        if self.summed:
            named, device = self.named_parameters(), self.mesh.runtime.device
            for group, names in self.summed:
                sum_gradients([named[name] for name in names], group, device)
        return loss if self.counts_loss else torch.zeros_like(loss)

    def _accumulate(
        self, tokens: Tensor, given: Rows, scale: Tensor | float, forwards: int
    ) -> Tensor:
        called, size = self.called or self.stages[0], len(tokens) // forwards
        replicated = isinstance(called, DistributedDataParallel)
        wide = torch.float32 if tokens.device.type == "mps" else torch.float64
        loss = torch.zeros((), dtype=wide, device=tokens.device)
        for index in range(forwards):
            rows, last = slice(index * size, (index + 1) * size), index == forwards - 1
            if isinstance(called, FSDPModule) and forwards > 1:
                called.set_requires_all_reduce(last)  # replicas talk once a step
            with called.no_sync() if replicated and not last else nullcontext():  # type: ignore[operator]
                part = called(tokens[rows], **{name: t[rows] for name, t in given.items()})
                (part * scale).backward()
            loss += part.detach()
        return loss

    def rebalance(self) -> None:
        """Move the biases that balance experts by the tokens of all ranks that have them."""
        for stage in self.stages:
            stage.model.rebalance(self._summed_over_stage)

    def _summed_over_stage(self, counts: Tensor) -> Tensor:
        if self.layout.pipeline == 1:
            return self.mesh.runtime.sum(counts)
        torch.distributed.all_reduce(counts, group=self.mesh.group(*STAGE))
        return counts

    def loss(self, tokens: Tensor, given: Rows) -> Tensor:
        """Return the loss without gradients; of ranks that return the same, one counts it."""
        with torch.no_grad():
            if self.pipeline is not None:
                found = self.pipeline.loss(tokens, given)
            else:
                found = self.stages[0](tokens, **given)
        return found if self.counts_loss else torch.zeros_like(found)

    @property
    def training(self) -> bool:
        return self.stages[0].training

    def set_training(self, on: bool) -> None:
        """Turn dropout, and what else is done in training only, on or off."""
        for stage in self.stages:
            stage.train(on)

    def gradient_norm(self) -> Tensor:
        """Return the norm of the whole gradient, every element of it counted once.

        For a model that ranks divide, and all of them must call it.
        """
        named = self.named_parameters()
        mine = [local(named[n].grad) for n in self.owned if named[n].grad is not None]
        norms = torch.stack(torch._foreach_norm(mine)) if mine else torch.zeros(1)
        total = norms.square().sum().to(self.mesh.runtime.device)
        self.mesh.runtime.sum(total)
        return total.sqrt()

    @torch.no_grad()
    def load(self, weights: Reader) -> None:
        """Take over weights, of which only this rank's parts are read."""
        for name, mine in self.state().items():
            local(mine).copy_(weights.read(name, self.part(name, mine)))

    def parts_of_state(
        self, shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, Tensor | None, Part]]:
        """Yield what this rank needs of an optimizer's tensors named "<parameter>.<key>": name,
        parameter (None: the tensor is not divided as one is) and part."""
        named = self.named_parameters()
        for name, shape in shapes.items():
            owner = named.get(name.rpartition(".")[0])
            if owner is not None and self.part(name.rpartition(".")[0], owner).shape == shape:
                yield name, owner, self.part(name.rpartition(".")[0], owner)
            elif owner is not None or self.is_whole:
                yield name, None, Part.all_of(shape)

    def like(self, parameter: Tensor | None, mine: Tensor) -> Tensor:
        """Return this rank's part of a tensor in the form that its parameter has."""
        if not isinstance(parameter, DTensor):
            return mine
        return DTensor.from_local(
            mine.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def pieces(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Part, Tensor]]:
        """Yield what this rank has to save of tensors named "<parameter>" or "<parameter>.<key>":
        the name, which part of the whole it is, and the part itself."""
        named = self.state()
        for name, tensor in tensors.items():
            owner = name if name in named else name.rpartition(".")[0]
            part = self.part(owner, named[owner])
            if tensor.shape != named[owner].shape:  # a count of steps, which all have
                first = self.mesh.is_first(*COPIES, "shard", "tensor")
                part = Part.all_of(tuple(tensor.shape), first)
            if part.owned:
                yield name, part, local(tensor.detach())
