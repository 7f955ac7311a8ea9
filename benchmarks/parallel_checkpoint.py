"""A checkpoint that four ranks save and four others load, against plain files of as many bytes.

The ranks that save divide the parameters (shard 4), those that load divide products too (tensor 2 x
shard 2), so each reads parts of what several wrote. The plain files are written and synced, and
read, by four processes at once; what is read was dropped from the page cache first. The memory of
a rank is all that it has resident: what is shared with others, and pages of files it maps, too.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from memory import peak_memory
from parallel_ranks import Rank, fork_ranks, stepper_of
from shapes import QUICK, SHAPES
from table import median, note, print_table, ratio, summarize

from dtt.config.schema import Config
from dtt.dist import local
from dtt.parallel.part import Part
from dtt.training.build import load_optimizer
from dtt.training.checkpoint import Checkpoints
from dtt.training.proof import Proof
from dtt.training.saved import read
from dtt.training.step import Stepper

RANKS = 4
SAVED, LOADED = {"shard": 4}, {"tensor": 2, "shard": 2}
BLOCK = 8 << 20
Figures = dict[str, float]


def config_of(parallel: dict[str, int], quick: bool) -> Config:
    model = (QUICK if quick else SHAPES["gpt2-124m"]).settings()
    training = {"batch_size": RANKS, "device": "cpu"}
    rest = {"training": training, "optimizer": {"name": "adamw"}, "parallel": parallel}
    return Config.model_validate({"model": model.model_dump(), **rest})


def fill(stepper: Stepper) -> None:
    """Give the optimizer the state that a step would leave."""
    for parameter in stepper.parameters:
        parameter.grad = torch.zeros_like(parameter)
        local(parameter.grad).normal_()
    stepper.update(1.0)


def to_save(
    stepper: Stepper,
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, Part]]]:
    """Return this rank's tensors and which parts they are, by group, as `Run.save` has them."""
    groups = {"model": stepper.model.state(), "optimizer": stepper.optimizer.named_state()}
    rows = {group: list(stepper.model.pieces(named)) for group, named in groups.items()}
    tensors = {group: {name: t for name, _, t in found} for group, found in rows.items()}
    parts = {group: {name: part for name, part, _ in found} for group, found in rows.items()}
    return tensors, parts


def forget_peak() -> int:
    """Let the peak memory of this process start again from what it has now, and return that."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5", encoding="ascii")
    return peak_memory()


def together(rank: Rank, call: Callable[[], object]) -> float:
    """Return how long this rank took for what all do at once."""
    rank.barrier.wait()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def write_plain(path: Path, size: int) -> None:
    block = os.urandom(BLOCK)
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, BLOCK):
            file.write(block[: size - start])
        os.fsync(file.fileno())


def read_plain(path: Path) -> None:
    buffer = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def drop_from_cache(folder: Path) -> None:
    """Have the next reading of all files below `folder` come from the disk; they are synced."""
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def saving(folder: Path, quick: bool) -> Callable[[Rank], Figures]:
    """Return what a rank does that saves: plain files first, then its part of the checkpoint."""

    def work(rank: Rank) -> Figures:
        stepper, runtime = stepper_of(config_of(SAVED, quick), rank.runtime), rank.runtime
        fill(stepper)
        tensors, parts = to_save(stepper)
        size = sum(t.nbytes for group in tensors.values() for t in group.values())
        plain = together(rank, lambda: write_plain(folder / f"plain-{runtime.rank}", size))
        checkpoints = Checkpoints(
            folder / "checkpoints",
            keep=1,
            background=False,
            warn=note,
            rank=runtime.rank,
            ranks=RANKS,
        )

        def save() -> None:
            work = runtime.on_main(lambda: checkpoints.begin(1))
            checkpoints.save(1, tensors, {}, {}, parts=parts, work=work)

        before = forget_peak()
        seconds = together(rank, save)
        checkpoints.finish()
        memory = {"peak": peak_memory(), "more": peak_memory() - before}
        return {"size": size, "plain": plain, "dtt": seconds, **memory}

    return work


def loading(folder: Path, quick: bool) -> Callable[[Rank], Figures]:
    """Return what a rank does that loads, as `dtt train` does when it goes on with a run."""

    def work(rank: Rank) -> Figures:
        stepper, runtime = stepper_of(config_of(LOADED, quick), rank.runtime), rank.runtime
        if runtime.is_main:
            drop_from_cache(folder)
        plain = together(rank, lambda: read_plain(folder / f"plain-{runtime.rank}"))
        if runtime.is_main:
            drop_from_cache(folder)
        path, loaded = folder / "checkpoints/step-00000001", 0.0

        def load() -> None:
            nonlocal loaded
            begin = time.perf_counter()
            with closing(Proof(read(path, hashed=False), runtime)) as proof:
                stepper.model.load(proof.group("model"))
                load_optimizer(stepper, proof.group("optimizer"))
                loaded = time.perf_counter() - begin
                if (damaged := proof.end(None)) is not None:
                    raise RuntimeError(damaged)

        before = forget_peak()
        seconds = together(rank, load)
        memory = {"peak": peak_memory(), "more": peak_memory() - before}
        return {"plain": plain, "dtt": seconds, "loaded": loaded, **memory}

    return work


def print_checkpoint(where: str | None, rounds: int, quick: bool) -> None:
    """Save and load in turn, each beside its limit."""
    found: dict[str, list[Figures]] = {"save": [], "load": []}
    for number in range(rounds):
        with tempfile.TemporaryDirectory(dir=where, prefix="dtt-checkpoint-") as name:
            for what, make in (("save", saving), ("load", loading)):
                ranks = fork_ranks(make(Path(name), quick), RANKS)
                # All are done when the last rank is; sizes add up.
                most = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
                most["size"] = sum(rank.get("size", 0) for rank in ranks)
                found[what].append(most)
                note(f"round {number + 1}/{rounds}  {what}: {most}")
    print_figures(found)


def print_figures(found: dict[str, list[Figures]]) -> None:
    """Print the medians of what every round found."""
    size = found["save"][0]["size"]
    titles = {
        "save": "save, shard 4, until the last rank has it on the disk",
        "load": "load on tensor 2 x shard 2",
    }
    rows: list[list[Any]] = []
    for what, title in titles.items():
        middle = {key: median(each[key] for each in found[what]) for key in found[what][0]}
        reached = ratio(middle["plain"], middle["dtt"])
        peak = f"{middle['peak'] / 1e6:,.0f} MB, +{middle['more'] / 1e6:,.0f}"
        rows.append([title, reached, middle["dtt"], middle["plain"], peak])
        summarize(f"checkpoint of 4 ranks, {what}: speed to the disk's", reached, "0.7x")
        if what == "load":
            loaded = middle["loaded"]
            rows.append(["until it is loaded; the rest proves it whole", "-", loaded, None, "-"])
    cold = "from the disk" if hasattr(os, "posix_fadvise") else "warm, from memory"
    print(f"{size / 1e9:.2f} GB of state, {size / RANKS / 1e6:,.0f} MB a rank; reading is {cold}\n")
    heads = ["of the disk", "s", "plain files, s", "peak of a rank, of it meanwhile"]
    print_table(["checkpoint", *heads], rows)
