"""From a model on one device to one that all ranks of a layout train."""

from __future__ import annotations

import copy
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from dtt.config.schema import Config
from dtt.dist import Runtime
from dtt.errors import ConfigError
from dtt.model.decoder import Decoder
from dtt.model.loss import sum_cross_entropy
from dtt.model.objective import Objective
from dtt.parallel.context import divide_sequences
from dtt.parallel.exchange import sum_forward
from dtt.parallel.expert import divide_experts
from dtt.parallel.layout import STAGES, Layout
from dtt.parallel.loss import DividedLoss
from dtt.parallel.mesh import Mesh
from dtt.parallel.model import COPIES, EXPERT_COPIES, STAGE, ParallelModel, Reader
from dtt.parallel.pipeline import Pipeline
from dtt.parallel.shard import shard
from dtt.parallel.tensor import divide_tensors

_REPLICATED: list[nn.Module] = []
"""Never freed: that joins gloo's thread with the interpreter locked, which hangs for good when the
thread needs the lock to free a tensor. The rank ends through `dtt.dist.leave`."""


def parallelize(
    objective: Objective,
    layout: Layout,
    config: Config,
    runtime: Runtime,
    rows: int,
    forwards: int,
    weights: Reader,
) -> ParallelModel:
    """Return what the layout's ranks train together; `objective` is on the meta device.

    In this order: stages of a pipeline, sequences, matrices, experts, compiled blocks, then divided
    or replicated parameters, for which only now there is memory, filled with `weights`. `rows`
    sequences go through in so many `forwards` a step.
    """
    mesh = Mesh(layout, runtime)
    found = ParallelModel(_stages(objective, mesh, config), mesh)
    for stage in found.stages:
        if isinstance(stage.model, Decoder):
            _divide(stage, stage.model, found)
        elif layout.tensor > 1:
            _divide_theirs(stage, found)
        if config.training.compile:
            for block in stage.model.blocks:
                block.compile()
        stage.train()
        if not layout.is_plain and (layout.shard > 1 or mesh.size(*COPIES) > 1):
            apart = mesh.device_mesh(EXPERT_COPIES) if layout.expert > 1 else None
            divided = mesh.device_mesh(COPIES)
            kind = stage.model.gathered_in()
            shard(stage, stage.model.blocks, divided, kind, config.parallel, apart)
    for stage in found.stages:
        stage.to_empty(device="cpu" if config.parallel.offload else runtime.device)
        stage.model.reset()
        for module in stage.modules():  # buffers are not divided, and stay on the device
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(runtime.device))
    found.load(weights)
    if not isinstance(objective.model, Decoder):
        _examine(objective, found)
    by_us = config.training.engine == "dtt"  # Lightning replicates by itself
    if layout.is_plain and layout.replicate > 1 and by_us:
        found.called = _replicated(objective)
    if layout.pipeline > 1:
        found.pipeline = _pipeline(found, config, rows // forwards, forwards)
    return found


def _divide(stage: Objective, model: Decoder, found: ParallelModel) -> None:
    """Divide sequences, matrices and experts among ranks."""
    layout, mesh = found.layout, found.mesh
    if layout.context > 1:
        divide_sequences(stage, model, mesh.group("context"))
    if layout.tensor > 1:
        _divide_tensors(stage, model, found)
    if layout.expert > 1:
        found.experts |= divide_experts(model, mesh.group("expert"), found.parts)
    _share_balance(model, mesh)


def _divide_theirs(stage: Objective, found: ParallelModel) -> None:
    """Divide matrices of a model of `transformers`."""
    from dtt.model.hf.model import HfCausalModel
    from dtt.parallel.plan import divide_by_plan

    assert isinstance(stage.model, HfCausalModel)
    group = found.mesh.group("tensor")
    parts, copies = divide_by_plan(stage.model, group)
    found.parts |= parts
    found.summed.append((group, copies))


def _examine(objective: Objective, found: ParallelModel) -> None:
    """Look at what a model of `transformers` does, now that it has its weights."""
    from dtt.model.hf.examination import examine
    from dtt.parallel.plan import examine_divided

    runtime = found.mesh.runtime
    problem: tuple[str | None, str | None] = None, None
    try:
        if found.layout.tensor > 1:
            known = {*found.parts, *(name for _, names in found.summed for name in names)}
            examine_divided(objective, found.mesh.group("tensor"), runtime.device, known)
        else:
            examine(objective)
    except ConfigError as error:  # perhaps of some ranks only
        problem = error.what, error.fix
    what, fix = (runtime.first(said) for said in problem)
    if what is not None:
        raise ConfigError(what, fix or "")
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # without a backward pass it may keep what it gathered


def _replicated(objective: Objective) -> nn.Module:
    # Ranks have counts of their own in buffers; the option's name changed in PyTorch 2.13.
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    option: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    made = DistributedDataParallel(objective, gradient_as_bucket_view=True, **option)
    _REPLICATED.append(made)
    return made


def _stages(objective: Objective, mesh: Mesh, config: Config) -> list[Objective]:
    """Return this rank's parts of the model."""
    layout = mesh.layout
    if layout.pipeline == 1:
        return [objective]
    assert isinstance(objective.model, Decoder), "resolve() refuses to part others"
    layers = len(objective.model.blocks)
    each = STAGES[config.parallel.schedule]
    number, found = layout.pipeline * each, []
    for turn in range(each):
        index = turn * layout.pipeline + mesh.place["pipeline"]
        blocks = range(layers * index // number, layers * (index + 1) // number)
        stage = copy.deepcopy(objective) if turn < each - 1 else objective
        assert isinstance(stage.model, Decoder)
        stage.model.keep_part(blocks, first=index == 0, last=index == number - 1)
        if config.parallel.schedule == "zero-bubble":
            stage.loss = partial(sum_cross_entropy, twice=True)
        found.append(stage)
    return found


def _share_balance(model: Decoder, mesh: Mesh) -> None:
    """Have figures of the balance of experts summed over the ranks that share sequences."""
    if model.settings.experts is None:
        return
    # Groups are made on all ranks, also on those whose blocks have no experts.
    if mesh.layout.pipeline > 1:
        mesh.group(*STAGE)
    if mesh.size("context", "tensor") > 1:
        group = mesh.group("context", "tensor")
        for moe in model.experts():
            moe.sum_rows = partial(sum_forward, group=group)


def _divide_tensors(stage: Objective, model: Decoder, found: ParallelModel) -> None:
    group = found.mesh.group("tensor")
    parts, copies = divide_tensors(model, group)
    found.parts |= parts
    found.summed.append((group, copies))
    if model.norm is not None:
        name = "embed.weight" if model.head is None else "head.weight"
        stage.loss = DividedLoss(parts[name].ranges[0][0][0], group)


def _pipeline(found: ParallelModel, config: Config, rows: int, forwards: int) -> Pipeline:
    layout, length = found.layout, config.model.context
    each = STAGES[config.parallel.schedule]
    shape = (rows, length // layout.context // layout.tensor, config.model.dim)
    stages = [
        (turn * layout.pipeline + found.mesh.place["pipeline"], stage)
        for turn, stage in enumerate(found.stages)
    ]
    return Pipeline(
        stages,
        layout.pipeline * each,
        config.parallel.schedule,
        forwards,
        torch.empty(rows, length, dtype=torch.int64, device="meta"),
        torch.empty(shape, device="meta", requires_grad=True),
        found.mesh.group("pipeline"),
        found.mesh.runtime.device,
    )
