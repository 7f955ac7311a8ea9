"""Tensor parallelism of a model of `transformers`, as the plan in its own config says.

`base_model_tp_plan` names linear layers, and how each is divided. Between them every rank has all
tokens and computes the same, so that what is not divided (norms, embedding, head) needs no exchange
and has the same gradient everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn
from torch.distributed import ProcessGroup

from dtt.errors import ConfigError
from dtt.model.hf.model import HfCausalModel
from dtt.parallel.exchange import gather_same, share, sum_backward, sum_forward
from dtt.parallel.part import Part, Range
from dtt.parallel.tensor import shares_of

OUTPUTS = {"colwise": 1, "packed_colwise": 2, "colwise_gather_output": 1}
"""Styles that divide what a layer puts out, with the number of matrices that are one there."""
INPUTS = {"rowwise", "rowwise_split_input"}
"""Styles that divide what goes in; what comes out is summed over ranks."""
SUMMED = "replicated_with_grad_allreduce"
"""Parameters that all ranks have, and use for their own heads."""


def divide_by_plan(model: HfCausalModel, group: ProcessGroup) -> tuple[dict[str, Part], list[str]]:
    """Leave this rank its share of the matrices, and hook up the exchanges.

    Returns what it has of each divided parameter, and those of which all ranks have all, and a
    share of the gradient. ConfigError if the plan, or the model, cannot be divided so.
    """
    parts: dict[str, Part] = {}
    copies: list[str] = []
    _refuse_heads(model, group.size())
    for path, module, style in _planned(model):
        if style == SUMMED:
            copies += [f"{path}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
            continue
        if not isinstance(module, nn.Linear) or style not in INPUTS | OUTPUTS.keys():
            kind = type(module).__name__
            raise _refused(model, f"has {path} ({kind}) divided as {style!r}, unknown to dtt")
        width = module.in_features if style in INPUTS else module.out_features
        _refuse_rest(f"the width of {path}", width // OUTPUTS.get(style, 1), group.size())
        divide = _divide_inputs if style in INPUTS else _divide_outputs
        parts |= {f"{path}.{leaf}": part for leaf, part in divide(module, style, group).items()}
    if not parts:
        raise _refused(model, "has no such plan")
    return parts, copies


def _planned(model: HfCausalModel) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield path, module and style of what the plan names, where * is the number of a layer."""
    prefix, plan = model.whole.base_model_prefix, model.whole.config.base_model_tp_plan or {}
    for path, module in model.named_modules():
        style = plan.get(re.sub(r"\d+", "*", path).removeprefix(f"{prefix}."))
        if style is not None:
            yield path, module, style


def _refuse_heads(model: HfCausalModel, ranks: int) -> None:
    for key in ("num_attention_heads", "num_key_value_heads"):
        _refuse_rest(f"model.settings.{key}", getattr(model.whole.config, key, None) or 0, ranks)


def _refuse_rest(what: str, number: int, ranks: int) -> None:
    if number % ranks:
        raise ConfigError(
            f"{what} ({number}) is not divisible by parallel.tensor ({ranks})",
            "change one of the two",
        )


def _refused(model: HfCausalModel, why: str) -> ConfigError:
    return ConfigError(
        "parallel.tensor divides a model of transformers by the base_model_tp_plan of its config, "
        f"and {model.settings.architecture} {why}",
        "use parallel.shard, or model.name decoder",
    )


def _divide_outputs(layer: nn.Linear, style: str, group: ProcessGroup) -> dict[str, Part]:
    pieces = OUTPUTS[style]
    rows = shares_of([layer.out_features // pieces] * pieces, group.size(), group.rank())
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
