"""Does every layout of ranks train the model that one rank trains? Proven on this machine's CPU.

The user's own model, made small, takes the same steps on one process and on each layout, in fp32.
Losses alone hide errors, so every gradient and every update is compared. Each step starts from the
state that one process had: what differs is then the step's own, not a rounding that twenty steps
have blown up.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch._dynamo  # optimizers import it: once here, and not on every rank
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from dtt.config.model import Model, Rotary
from dtt.config.schema import Config
from dtt.data.loader import Batch
from dtt.data.windows import IGNORED
from dtt.dist import Place, Runtime, leave
from dtt.dist import start as meet
from dtt.errors import EXIT_DONE, NumericError, PeerError
from dtt.parallel.layout import resolve
from dtt.parallel.shard import whole
from dtt.training.objective import Objective
from dtt.training.run import build_model, build_stepper, take_over

STEPS, SEQUENCES, CONTEXT, VOCABULARY, WIDTH = 20, 8, 32, 509, 16
WAIT = 300.0
"""Seconds that the ranks of a case may take."""


@dataclass(frozen=True)
class Case:
    """A way to train: ranks, their layout, sequences per forward, and what it may differ by."""

    name: str
    ranks: int
    parallel: Mapping[str, int | bool]
    micro: int
    loss: float = 1e-6
    """Largest relative difference of a loss."""
    gradient: float = 1e-5
    """Largest difference of a gradient, relative to the parameter's largest."""
    update: float = 5e-2
    """Largest difference of a parameter's update, relative to its norm: optimizers that divide by
    a gradient's own size, or orthogonalize it in bf16, enlarge what the gradients differ by."""


ALONE = Case("one process", 1, {}, SEQUENCES)
CASES = (
    Case("accumulation", 1, {}, 2),
    Case("DDP", 2, {}, 4),
    Case("DDP, accumulation", 2, {}, 2),
    Case("FSDP2", 2, {"shard": 2}, 4),
    Case("FSDP2, not resharded", 2, {"shard": 2, "reshard": False}, 4),
    Case("FSDP2, accumulation", 4, {"shard": 4}, 1),
    Case("HSDP", 4, {"replicate": 2, "shard": 2}, 2),
)


@dataclass(frozen=True)
class Difference:
    """How far a case is from one process."""

    loss: float
    norm: float
    gradient: float
    parameter: str
    """Where the gradients differ most."""
    update: float

    def within(self, case: Case) -> bool:
        """Whether it is what the order of sums may make; False for what is not a number."""
        gradient = max(self.gradient, self.norm)
        return self.loss <= case.loss and gradient <= case.gradient and self.update <= case.update


def shrink(model: Model) -> Model:
    """Return a model of the same kind that takes milliseconds: every setting of it that decides
    what is computed is kept, sizes are not."""
    grouped = model.heads // (model.kv_heads or model.heads)
    kv_heads = min(model.kv_heads or model.heads, 2)
    heads = kv_heads * min(grouped, 2)
    sizes: dict[str, Any] = {
        "dim": heads * WIDTH,
        "layers": min(model.layers, 2),
        "heads": heads,
        "kv_heads": kv_heads if model.kv_heads else None,
        "head_dim": None if model.head_dim is None else 2 * WIDTH,
        "hidden": None if model.hidden is None else 3 * heads * WIDTH,
        "context": CONTEXT,
        "window": None if model.window is None else min(model.window, CONTEXT // 4),
        "vocab_size": VOCABULARY,
        "dropout": 0.0,
        "preset": None,
    }
    if isinstance(model.positions, Rotary):
        original = max(int(CONTEXT / model.positions.factor), 1)
        sizes["positions"] = model.positions.model_copy(update={"original_context": original})
    return model.model_copy(update=sizes)


def small(config: Config, case: Case) -> Config:
    """Return what a case trains."""
    training: dict[str, Any] = {
        "batch_size": SEQUENCES,
        "micro_batch_size": case.micro,
        "accumulation": None,
        "precision": "fp32",
        "compile": False,
    }
    parallel = type(config.parallel).model_validate(case.parallel)
    return config.model_copy(
        update={
            "model": shrink(config.model),
            "training": config.training.model_copy(update=training),
            "parallel": parallel,
        }
    )


def batch(step: int, rank: int, ranks: int) -> Batch:
    """Return a rank's share of a step: random tokens, a third of the rows in two documents."""
    draw = torch.Generator().manual_seed(step)
    rows = torch.randint(VOCABULARY, (SEQUENCES, CONTEXT + 1), generator=draw)
    targets, positions = rows[:, 1:].clone(), torch.arange(CONTEXT).repeat(SEQUENCES, 1)
    positions[::3, CONTEXT // 2 :] -= CONTEXT // 2
    targets[::3, CONTEXT // 2 - 1] = IGNORED
    targets[-1, 5:] = IGNORED  # ranks do not have equally many targets
    mine = slice(rank * SEQUENCES // ranks, (rank + 1) * SEQUENCES // ranks)
    count = int((targets != IGNORED).sum())
    return Batch(rows[mine, :-1], targets[mine], positions[mine], count, ())


def train(
    config: Config, runtime: Runtime, alone: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Take the steps, each from the state in `alone` if it is given.

    Returns losses, gradient norms, and by step and name gradients, weights and optimizer state.
    """
    layout = resolve(config.parallel, runtime.ranks)
    model = build_model(config, runtime, torch.float32)
    stepper = build_stepper(Objective(model), layout, config, runtime, torch.float32)
    found: dict[str, Tensor] = {}
    losses, norms = [], []
    for step in range(STEPS):
        if alone is not None and step:
            groups = (_named(alone, f"{step - 1}.{group}.") for group in ("model", "optimizer"))
            take_over(model, stepper, *groups)
        share = batch(step, runtime.rank, runtime.ranks)
        result = stepper.step(share, step, stop=False)
        losses.append(result.totals[0] / share.count)
        norms.append(result.grad_norm)
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found |= _numbered(step, "gradient", gradients)
        stepper.update(1.0)
        found |= _numbered(step, "model", dict(model.named_parameters()))
        if alone is None:
            found |= _numbered(step, "optimizer", stepper.optimizer.named_state())
    return found | {"losses": torch.stack(losses), "norms": torch.stack(norms)}


def _numbered(step: int, group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{step}.{group}.{n}": whole(t.detach()).clone() for n, t in tensors.items()}


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def run(config: Config, case: Case, alone: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Train a case in processes of its own, and return what its first rank found."""
    with tempfile.TemporaryDirectory(prefix="dtt-verify-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
        probe.close()
        # Forked ranks need no second import of torch; this process computes nothing itself.
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        arguments = [(config, case, rank, port, folder, alone) for rank in range(case.ranks)]
        ranks = [context.Process(target=_rank, args=each, daemon=True) for each in arguments]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(WAIT)
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
        if any(codes):
            raise PeerError(f"{case.name}: its ranks ended with {codes}", "see the messages above")
        return load_file(Path(folder, "found.safetensors"))


def _rank(
    config: Config,
    case: Case,
    rank: int,
    port: int,
    folder: str,
    alone: Mapping[str, Tensor] | None,
) -> NoReturn:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        runtime = meet(Place(rank, case.ranks, rank, case.ranks, "verify"), "cpu", 1)
        found = train(small(config, case), runtime, alone)
        if runtime.is_main:
            save_file(found, Path(folder, "found.safetensors"))
        runtime.close()
    except Exception as error:
        print(f"dtt verify: {case.name}, rank {rank}: {error!r}", file=sys.stderr, flush=True)
        leave(1)
    leave(0)


def compare(found: Mapping[str, Tensor], alone: Mapping[str, Tensor]) -> Difference:
    """Return how far a case is from one process; what is missing differs by infinity."""
    worst, where, update = 0.0, "-", 0.0
    for name, tensor in alone.items():
        step, _, rest = name.partition(".")
        group, _, parameter = rest.partition(".")
        if group == "gradient":
            error = _apart(found[name], tensor) if name in found else math.inf
            if not error <= worst:
                worst, where = error, f"{parameter}, step {int(step) + 1}"
        elif group == "model" and step != "0":
            moved = (tensor - alone[f"{int(step) - 1}.{rest}"]).norm().item()
            apart = (found[name] - tensor).norm().item()
            update = max(update, apart / moved if moved else apart)
    losses = ((found["losses"] - alone["losses"]) / alone["losses"]).abs().max().item()
    norms = ((found["norms"] - alone["norms"]) / alone["norms"]).abs().max().item()
    return Difference(losses, norms, worst, where, update)


def _apart(found: Tensor, alone: Tensor) -> float:
    largest = alone.abs().max().item()
    apart = (found - alone).abs().max().item()
    return apart / largest if largest else apart


def verify(config: Config) -> Iterator[tuple[Case, Difference]]:
    """Yield each case with its difference from one process."""
    alone = run(config, ALONE)
    for case in CASES:
        yield case, compare(run(config, case, alone), alone)


def verify_command(config: Config) -> int:
    """Print a table of all cases; NumericError names the first that differs."""
    model, console = shrink(config.model), Console()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in ("layout", "ranks", "loss", "norm", "gradient", "update", ""):
        table.add_column(head, justify="left" if head in ("layout", "") else "right", no_wrap=True)
    wrong: list[str] = []
    for case, found in verify(config):
        good = found.within(case)
        if not good:
            wrong.append(f"{case.name}, where {found.parameter} is {found.gradient:.1e} off")
        values = (found.loss, found.norm, found.gradient, found.update)
        figures = (f"{value:.1e}" for value in values)
        verdict = "[green]same[/]" if good else "[red bold]DIFFERS[/]"
        table.add_row(case.name, str(case.ranks), *figures, verdict)
    console.print(
        f"{model.layers} layers x {model.dim}, {model.heads} heads, vocabulary {VOCABULARY}, "
        f"{config.optimizer.name}, fp32, {STEPS} steps.\nLargest differences from one process:"
    )
    console.print(table)
    if wrong:
        raise NumericError(
            f"{len(wrong)} of {len(CASES)} layouts do not train the same model: {wrong[0]}",
            "do not trust runs with these layouts",
        )
    return EXIT_DONE
