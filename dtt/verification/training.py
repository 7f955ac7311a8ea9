"""Training cases in processes of their own, and what their ranks found, put together."""

from __future__ import annotations

import json
import math
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch._dynamo  # optimizers import it: once here, and not on every rank
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dtt.config.schema import Config
from dtt.dist import Place, Runtime, leave
from dtt.dist import start as meet
from dtt.errors import ConfigError, PeerError
from dtt.machine import free_port
from dtt.parallel.layout import resolve
from dtt.parallel.part import Part
from dtt.precision import choose_precision
from dtt.training.build import build_model, build_stepper, load_optimizer
from dtt.verification import cases as sizes
from dtt.verification.cases import Case, batch, small

WAIT = 120.0
"""Seconds that a case may take."""


def train(
    config: Config, runtime: Runtime, alone: Mapping[str, Tensor] | None
) -> tuple[dict[str, Tensor], dict[str, Part]]:
    """Take the steps, each from the state in `alone` if it is given.

    Returns losses, gradient norms, and by step and name this rank's parts of gradients, weights and
    optimizer state; and which parts they are.
    """
    layout = resolve(config.parallel, config.model, runtime.ranks)
    dtype, _ = choose_precision(config.training.precision, runtime.device)
    whole = build_model(config, dtype)
    stepper = build_stepper(whole, layout, config, runtime, dtype)
    model = stepper.model
    found: dict[str, Tensor] = {}
    parts: dict[str, Part] = {}

    def keep(step: int, group: str, tensors: Mapping[str, Tensor]) -> None:
        for name, part, tensor in model.pieces(tensors):
            parts[f"{step}.{group}.{name}"] = part
            found[f"{step}.{group}.{name}"] = tensor.clone()

    losses, norms = [], []
    for step in range(sizes.STEPS):
        if alone is not None and step:
            model.load(Whole(alone, f"{step - 1}.model."))
            load_optimizer(stepper, Whole(alone, f"{step - 1}.optimizer."))
        share = batch(step, layout.data_rank(runtime.rank), layout.data)
        result = stepper.step(share, step)
        losses.append(result.totals[0] / share.count)
        norms.append(result.grad_norm.clone())
        named = model.named_parameters()
        keep(step, "gradient", {n: p.grad for n, p in named.items() if p.grad is not None})
        stepper.update(1.0)
        keep(step, "model", model.state())
        if alone is None:
            keep(step, "optimizer", stepper.optimizer.named_state())
    found |= {"losses": torch.stack(losses), "norms": torch.stack(norms)}
    return found, parts


@dataclass(frozen=True)
class Whole:
    """Those of a dictionary's tensors whose names have a prefix, as a Reader."""

    tensors: Mapping[str, Tensor]
    prefix: str

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found = {n: t for n, t in self.tensors.items() if n.startswith(self.prefix)}
        return {n.removeprefix(self.prefix): tuple(t.shape) for n, t in found.items()}

    def read(self, name: str, part: Part) -> Tensor:
        return part.take(self.tensors[self.prefix + name])


def run(
    config: Config, cases: Sequence[Case], alone: Mapping[str, Tensor] | None = None
) -> list[dict[str, Tensor]]:
    """Return what the ranks of each case found; ConfigError if one cannot be trained so."""
    found = []
    for outcome in outcomes(config, cases, alone):
        if isinstance(outcome, ConfigError):
            raise outcome
        found.append(outcome)
    return found


def outcomes(
    config: Config, cases: Sequence[Case], alone: Mapping[str, Tensor] | None = None
) -> list[dict[str, Tensor] | ConfigError]:
    """Train cases of equally many ranks in processes of their own; return what each found, or why
    it cannot be trained so, where that shows with the weights only."""
    ranks = cases[0].ranks
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="dtt-verify-") as folder:
        # Forked ranks need no second import of torch; this process computes nothing itself.
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        arguments = [(config, cases, rank, port, folder, alone) for rank in range(ranks)]
        processes = [context.Process(target=_rank, args=each, daemon=True) for each in arguments]
        for process in processes:
            process.start()
        deadline = time.monotonic() + WAIT * len(cases)
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            multiprocessing.connection.wait([p.sentinel for p in processes if p.is_alive()], 1.0)
            if any(process.exitcode for process in processes):
                break  # the others would wait for it
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        if any(code != 0 for code in codes):
            raise PeerError(f"ranks ended with {codes}", "see the messages above")
        return [_assembled(Path(folder), index, ranks) for index in range(len(cases))]


def _assembled(folder: Path, index: int, ranks: int) -> dict[str, Tensor] | ConfigError:
    """Return whole tensors from the parts that the ranks have written; what no rank has is NaN."""
    refused = folder / f"{index}-refused.json"
    if refused.exists():
        return ConfigError(*json.loads(refused.read_bytes()))
    found: dict[str, Tensor] = {}
    for rank in range(ranks):
        with safe_open(folder / f"{index}-{rank}.safetensors", framework="pt") as file:
            parts = json.loads(file.metadata()["parts"])
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if name not in parts:  # the same on every rank
                    found[name] = tensor
                    continue
                part = Part(*parts[name])
                if name not in found:
                    found[name] = torch.full(part.shape, math.nan)
                part.put(tensor, found[name])
    return found


def _rank(
    config: Config,
    cases: Sequence[Case],
    rank: int,
    port: int,
    folder: str,
    alone: Mapping[str, Tensor] | None,
) -> NoReturn:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks, doing = cases[0].ranks, "meeting"
    try:
        runtime = meet(Place(rank, ranks, rank, ranks, "verify"), "cpu", 1)
        for index, case in enumerate(cases):
            doing = case.name
            try:
                found, parts = train(small(config, case), runtime, alone)
            except ConfigError as error:  # on all ranks
                if rank == 0:
                    text = json.dumps([error.what, error.fix])
                    Path(folder, f"{index}-refused.json").write_text(text, encoding="utf-8")
                continue
            rows = {name: (part.shape, part.ranges) for name, part in parts.items()}
            file = Path(folder, f"{index}-{rank}.safetensors")
            save_file(found, file, {"parts": json.dumps(rows)})
        runtime.close()
    except Exception as error:
        print(f"dtt verify: {doing}, rank {rank}: {error!r}", file=sys.stderr, flush=True)
        leave(1)
    leave(0)
