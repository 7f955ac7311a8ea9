"""Tensor parallelism of a model of `transformers`, as the plan in its own config says.

`base_model_tp_plan` names linear layers, and how each is divided. Between them every rank has all
tokens and computes the same, so that what the plan does not name (embedding, head, most norms) has
the same gradient everywhere and needs no exchange; that it has is looked at before training.
"""

from __future__ import annotations

import re
from collections.abc import Container

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from dtt.config.model import HfModel
from dtt.dist import local
from dtt.errors import ConfigError
from dtt.model.hf.examination import examine, few_tokens, looking
from dtt.model.hf.model import HfCausalModel
from dtt.model.objective import Objective
from dtt.parallel.exchange import gather_same, share, sum_backward, sum_forward
from dtt.parallel.part import Part, Range
from dtt.parallel.tensor import shares_of

OUTPUTS = {"colwise", "colwise_gather_output"}
"""Styles that divide what a layer puts out."""
INPUTS = {"rowwise", "rowwise_split_input"}
"""Styles that divide what goes in; what comes out is summed over ranks."""
SUMMED = "replicated_with_grad_allreduce"
"""Parameters that all ranks have, and use for their own heads."""
SAME = 1e-2
"""Largest relative difference of gradients that all ranks compute alike."""
SHAPES = re.compile("size of tensor|shape|must match|cannot be multiplied")
"""What PyTorch says of tensors that do not go together."""
LAYER = re.compile(r"\.\d+(?=\.|$)")


def divide_by_plan(model: HfCausalModel, group: ProcessGroup) -> tuple[dict[str, Part], list[str]]:
    """Leave this rank its share of the matrices, and hook up the exchanges.

    Returns what it has of each divided parameter, and those of which all ranks have all, and a
    share of the gradient. ConfigError as `check_plan`.
    """
    parts: dict[str, Part] = {}
    copies: list[str] = []
    for path, module, style in _planned(model, group.size()):
        if style == SUMMED:
            copies += [f"{path}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
        elif isinstance(module, nn.Linear):
            divide = _divide_inputs if style in INPUTS else _divide_outputs
            parts |= {f"{path}.{leaf}": part for leaf, part in divide(module, style, group).items()}
    return parts, copies


def check_plan(settings: HfModel, ranks: int) -> None:
    """Raise ConfigError, with the arithmetic, if complete settings are of a model without a plan,
    or with one that does not go among so many ranks."""
    _planned(HfCausalModel(settings.model_copy(update={"vocab_size": 1})), ranks)


def examine_divided(
    objective: Objective, group: ProcessGroup, device: torch.device, known: Container[str]
) -> None:
    """Look at a divided model that has its weights, as `examine` does, and at the gradients of a
    few tokens: those of the layers' parameters that are not in `known` must be the same on all
    ranks of the group. What `known` says is believed (`dtt verify parallel` proves it).

    All must call it. ConfigError, on one rank or several: the architecture's code does not run
    divided, or the plan does not say that a parameter is used by each rank for its own heads or
    hidden units.
    """
    model = objective.model
    assert isinstance(model, HfCausalModel)
    try:
        examine(objective)
        tokens = few_tokens(model)
        if not tokens.numel():
            return
        with looking(objective):
            objective(tokens, tokens.flip(1)).backward()
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        if isinstance(error, dist.DistError) or not SHAPES.search(text):
            raise
        raise _refused(model, f"does not run divided so ({text})") from error
    blocks = {id(parameter) for block in model.blocks for parameter in block.parameters()}
    for name, parameter in model.named_parameters():
        if name not in known and id(parameter) in blocks and parameter.grad is not None:
            mine = local(parameter.grad).to(device)
            mean = mine.clone()
            dist.all_reduce(mean, group=group)
            mean /= group.size()
            sizes = torch.stack([(mine - mean).norm(), mine.norm()])
            dist.all_reduce(sizes, group=group)
            if sizes[0] > SAME * sizes[1]:
                raise _refused(model, f"does not say that ranks use {name} each for its own part")
    objective.zero_grad()


def _planned(model: HfCausalModel, ranks: int) -> list[tuple[str, nn.Module, str]]:
    """Return path, module and style of all that the plan names, where * is a layer's number."""
    prefix, plan = model.whole.base_model_prefix, model.whole.config.base_model_tp_plan or {}
    found = []
    for path, module in model.named_modules():
        style = plan.get(LAYER.sub(".*", path).removeprefix(f"{prefix}."))
        if style is None:
            continue
        found.append((path, module, style))
        if style == SUMMED:
            continue
        if style not in INPUTS | OUTPUTS or not isinstance(module, nn.Linear):
            kind = type(module).__name__
            raise _refused(model, f"has {path} ({kind}) divided as {style!r}, unknown to dtt")
        width = module.in_features if style in INPUTS else module.out_features
        _refuse_rest(f"the width of {path}", width, ranks)
        if style == "colwise" and "att" in path:
            for key in ("num_attention_heads", "num_key_value_heads"):
                heads = getattr(model.whole.config, key, None) or 0
                _refuse_rest(f"model.settings.{key}", heads, ranks)
    if not found:
        raise _refused(model, "has no such plan")
    return found


def _refuse_rest(what: str, number: int, ranks: int) -> None:
    if number % ranks:
        raise ConfigError(
            f"{what} ({number}) is not divisible by parallel.tensor ({ranks})",
            "choose another parallel.tensor, or other model.settings",
        )


def _refused(model: HfCausalModel, why: str) -> ConfigError:
    return ConfigError(
        "parallel.tensor divides a model of transformers by the base_model_tp_plan of its config, "
        f"and {model.settings.architecture} {why}",
        "use parallel.shard, or model.name decoder",
    )


def _divide_outputs(layer: nn.Linear, style: str, group: ProcessGroup) -> dict[str, Part]:
    rows = shares_of([layer.out_features], group.size(), group.rank())
    layer.register_forward_pre_hook(lambda module, given: (sum_backward(given[0], group),))
    if style == "colwise_gather_output":
        layer.register_forward_hook(lambda module, given, out: gather_same(out, -1, group))
    return _kept(layer, dict.fromkeys(("weight", "bias"), (rows,)))


def _divide_inputs(layer: nn.Linear, style: str, group: ProcessGroup) -> dict[str, Part]:
    ranks, rank = group.size(), group.rank()
    if style == "rowwise_split_input":
        layer.register_forward_pre_hook(lambda module, given: (share(given[0], -1, group),))
    layer.register_forward_hook(lambda module, given, out: sum_forward(out, group))
    if rank:
        layer.register_parameter("bias", None)  # the first rank adds it
    columns = shares_of([layer.in_features], ranks, rank)
    return _kept(layer, {"weight": (((0, layer.out_features),), columns), "bias": ()})


def _kept(layer: nn.Linear, ranges: dict[str, tuple[tuple[Range, ...], ...]]) -> dict[str, Part]:
    """Leave a layer so much of its parameters along their first dims, and all of the others."""
    parts: dict[str, Part] = {}
    for leaf, parameter in list(layer.named_parameters(recurse=False)):
        whole = Part.all_of(tuple(parameter.shape))
        mine = ranges[leaf]
        parts[leaf] = Part(whole.shape, (*mine, *whole.ranges[len(mine) :]))
        setattr(layer, leaf, nn.Parameter(parts[leaf].take(parameter.detach())))
    return parts
