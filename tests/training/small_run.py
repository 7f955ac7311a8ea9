"""A run of seconds for the tests of training, in this process or in processes of its own.

Processes are forked from a server that has imported torch already, so that one starts in a few
hundredths of a second instead of seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtt import cli
from dtt.config.load import load_config
from dtt.config.schema import Config
from dtt.data.loader import Batch
from dtt.data.windows import IGNORED
from dtt.dist import Place, Runtime, leave
from dtt.dist import start as connect
from dtt.launch import elastic, elastic_agent
from dtt.parallel.layout import resolve
from dtt.training import build
from dtt.training.saved import open_checkpoint
from dtt.training.step import Stepper, StepResult

WORDS = ("the", "a", "cat", "dog", "bird", "saw", "heard", "ran", "to", "from", "big", "small")
STEPS = 24
PRELOADED = ["dtt.launch.elastic_launch", "torch._dynamo", "matplotlib.pyplot", "small_run"]
SETTINGS = {
    "name": "small",
    "tokenizer.name": "char",
    "data.workers": "1",
    "data.source.name": "text",
    "data.source.path": "text.txt",
    "model.layers": "2",
    "model.dim": "32",
    "model.heads": "4",
    "model.context": "32",
    "model.dropout": "0.1",
    "training.batch_size": "8",
    "training.max_steps": str(STEPS),
    "training.precision": "fp32",
    "training.device": "cpu",
    "training.threads": "1",
    "evaluation.every": "10",
    "evaluation.max_tokens": "256",
    "sample.prompts": "[]",
    "checkpoint.every": "4",
}


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Machine:
    """One of several machines of a run: its name, and torchrun's arguments for its launcher."""

    name: str
    words: tuple[str, ...]


def write_text(path: Path, seed: int = 0, characters: int = 8000) -> None:
    """Write seeded words, a line for every ten."""
    draw = random.Random(seed)
    words = (draw.choice(WORDS) + (".\n" if i % 10 == 9 else " ") for i in range(characters))
    path.write_text("".join(words)[:characters], encoding="utf-8")


def flags(changes: Mapping[str, str | None] | None = None) -> list[str]:
    """The command line of the small run; a change to None leaves a flag out."""
    merged = {**SETTINGS, **(changes or {})}
    return [word for key, value in merged.items() if value for word in (f"--{key}", value)]


def small_config(changes: Mapping[str, str] | None = None) -> Config:
    """The configuration of the small run."""
    merged = {**SETTINGS, **(changes or {})}
    return load_config(overrides={key: (f"--{key}", value) for key, value in merged.items()})


def start(
    folder: Path,
    argv: list[str],
    *,
    environ: dict[str, str] | None = None,
    die: tuple[int, int] | None = None,
    slow: float = 0.0,
    lag: tuple[int, float] | None = None,
    grace: float = elastic_agent.GRACE,
    machine: Machine | None = None,
) -> Any:
    """Start `dtt ARGV` in `folder`; `die` = (rank, step): SIGKILL there, in the midst of a step.

    That step is counted from the rank's start, and only its first start dies. `lag` = (rank,
    seconds): that one is late with each step by so many. `grace` is how many seconds workers have
    to end when another one has died. On a `machine` it is the launcher of that machine's workers
    that is started; its output is in a folder of the machine's name.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    arguments = (folder, argv, environ or {}, die, slow, lag, grace, machine)
    process = context.Process(target=_main, args=arguments)
    process.start()
    return process


def wait(process: Any, folder: Path, seconds: float = 60) -> Done:
    """Wait for a started command and return how it ended."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"still running after {seconds} s: {_text(folder, 'err')}")
    return Done(process.exitcode, _text(folder, "out"), _text(folder, "err"))


def command(folder: Path, argv: list[str], **options: Any) -> Done:
    """Run `dtt ARGV` in `folder` in a process of its own, to its end."""
    return wait(start(folder, argv, **options), folder)


def _text(folder: Path, stream: str) -> str:
    return (folder / stream).read_text(encoding="utf-8")


def _main(
    folder: Path,
    argv: list[str],
    environ: dict[str, str],
    die: tuple[int, int] | None,
    slow: float,
    lag: tuple[int, float] | None,
    grace: float,
    machine: Machine | None,
) -> None:
    elastic_agent.GRACE = grace
    os.setpgrp()  # a group of its own, to be sent what a terminal sends
    os.chdir(folder)
    if machine is not None:
        folder = folder / machine.name
        folder.mkdir(exist_ok=True)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.update(environ)
    os.fsync = lambda handle: None  # a killed process does not lose what it wrote
    whole = Stepper.update

    def update(self: Stepper, factor: float) -> None:
        steps[0] += 1
        if die is not None and (self.runtime.rank, steps[0]) == die and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if slow:
            signal.sigtimedwait([], slow)
        whole(self, factor)

    begin = Stepper.step

    def step(self: Stepper, *arguments: Any) -> StepResult:
        if lag is not None and self.runtime.rank == lag[0]:
            time.sleep(lag[1])
        return begin(self, *arguments)

    steps, died = [0], folder / f"died-{os.getpid()}"
    Stepper.step = step  # type: ignore[method-assign]
    Stepper.update = update  # type: ignore[method-assign]
    code = cli.main(argv) if machine is None else elastic.main([*machine.words, *argv])
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def step_on_rank(
    folder: Path, settings: Mapping[str, str], rank: int, ranks: int, port: int
) -> None:
    """Compute the first step's gradients as one rank of some; rank 0 saves them in `folder`."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    runtime = connect(Place(rank, ranks, rank, ranks, "test"), "cpu", 1)
    stepper = build_stepper(small_config(settings), runtime)
    result = stepper.step(documents_batch(rank, ranks), 0, stop=lambda: rank == 1)
    found = named_results(stepper, result)
    if runtime.is_main:
        save_file(found, folder / "gradients.safetensors")
    runtime.close()
    leave(0)


def build_stepper(config: Config, runtime: Runtime) -> Stepper:
    """A model of 64 tokens with its optimizer, as a run builds them; gradients are not clipped."""
    settings = config.model.model_copy(update={"vocab_size": 64})
    config = config.model_copy(update={"model": settings})
    layout = resolve(config.parallel, settings, runtime.ranks)
    model = build.build_model(config, torch.float32)
    stepper = build.build_stepper(model, layout, config, runtime, torch.float32)
    stepper.grad_clip = None
    return stepper


def synthetic_batch(step: int, rank: int = 0, ranks: int = 1) -> Batch:
    """A rank's share of 8 random sequences."""
    rows = torch.randint(64, (8, 33), generator=torch.Generator().manual_seed(step))
    mine = rows.chunk(ranks)[rank]
    starts = tuple(range(len(mine)))
    return Batch(mine[:, :-1], mine[:, 1:], None, mine[:, 1:].numel() * ranks, starts)


DOCUMENTS = ((0, 12), (12, 20), (20, 32))
"""Where documents lie in a row of `documents_batch`; every third row lacks the last of them."""


def documents_batch(rank: int = 0, ranks: int = 1) -> Batch:
    """A rank's share of 8 rows of documents that do not see each other, with padding."""
    rows = torch.randint(64, (8, 33), generator=torch.Generator().manual_seed(9))
    tokens, targets = rows[:, :-1].clone(), rows[:, 1:].clone()
    positions = torch.cat([torch.arange(b - a) for a, b in DOCUMENTS]).repeat(8, 1)
    for rows_ in (tokens, positions):
        rows_[::3, 20:] = 0
    targets[::3, 20:] = IGNORED
    share = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    count = int((targets != IGNORED).sum())
    starts = tuple(range(8 // ranks))
    return Batch(tokens[share], targets[share], positions[share], count, starts, seen=1000 + rank)


def named_results(stepper: Stepper, result: StepResult) -> dict[str, Tensor]:
    """Gradients by parameter, and what the step returned."""
    gradients = {
        name: (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
        for name, parameter in stepper.model.named_parameters().items()
        if (grad := parameter.grad) is not None
    }
    return gradients | {"totals": result.totals, "grad_norm": result.grad_norm}


def losses(run: Path) -> dict[int, float]:
    """The loss of every step in metrics.jsonl, all digits; a step that is there twice fails."""
    found: dict[int, float] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "loss" in row:
            assert row["step"] not in found, f"step {row['step']} has two lines"
            found[row["step"]] = row["loss"]
    return found


def samples(run: Path) -> dict[int, int]:
    """The ledger of metrics.jsonl: what identifies the samples of every step."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["step"]: row["samples"] for row in rows if "samples" in row}


def await_step(run: Path, step: int, seconds: float = 60) -> None:
    """Wait until a run has written the figures of a step; `logging.every` says how soon it does."""
    deadline, path = time.monotonic() + seconds, run / "metrics.jsonl"
    while time.monotonic() < deadline:
        if path.exists() and f'{{"step": {step},' in path.read_text(encoding="utf-8"):
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step} after {seconds} s")


def children(process: Any) -> list[int]:
    """The processes that a started command has forked, in the order of their ranks."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in path.read_text(encoding="utf-8").split()]


def final_tensors(run: Path, which: str = "last") -> dict[str, Tensor]:
    """Model and optimizer of a checkpoint, by name."""
    saved = open_checkpoint(run, which)
    groups = {group: saved.tensors(group) for group in ("model", "optimizer")}
    return {f"{group}.{name}": t for group, all_ in groups.items() for name, t in all_.items()}


def assert_same_run(run: Path, other: Path) -> None:
    """Every loss and every tensor of the last checkpoint are bitwise equal."""
    assert losses(run) == losses(other)
    ours, theirs = final_tensors(run), final_tensors(other)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
