"""When memory does not suffice: which setting to lower, and to what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch

from dtt.config.schema import Config
from dtt.dist import Runtime
from dtt.errors import OutOfMemoryError
from dtt.parallel.layout import resolve
from dtt.reporting import is_out_of_memory
from dtt.training.batching import divide

HISTORY = 100_000
"""Allocations that a snapshot remembers, with the lines of code that asked for them."""

Phase = Literal["building", "training", "evaluating", "sampling"]
"""What a run does; one inside of another is what counts."""


def remember_allocations(config: Config, runtime: Runtime) -> None:
    """On CUDA, with logging.profile, keep from now on what code asked for which memory."""
    if runtime.device.type == "cuda" and config.logging.profile:
        torch.cuda.memory._record_memory_history(max_entries=HISTORY)


@contextmanager
def memory_explained(
    config: Config, runtime: Runtime, folder: Path, phase: Phase
) -> Iterator[None]:
    """Turn a lack of memory inside into an OutOfMemoryError that says what to lower to what.

    On CUDA, what memory holds is left in RUN/profile for pytorch.org/memory_viz.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error) or isinstance(error, OutOfMemoryError):
            raise
        left = _snapshot(folder, runtime.rank) if runtime.device.type == "cuda" else ""
        text = " ".join(str(error).split())[:200] or "no details"
        during = f" while {phase}" * (phase != "training")
        what = f"out of memory on {runtime.device}{during}: {text}{left}"
        raise OutOfMemoryError(what, "; or ".join(remedies(config, runtime, phase))) from error


def remedies(config: Config, runtime: Runtime, phase: Phase) -> list[str]:
    """Return what lowers the memory that a phase needs, what costs least first."""
    layout, context = resolve(config.parallel, config.model, runtime.ranks), config.model.context
    micro = divide(config.training, layout.data, layout.pipeline).micro_batch_size
    shorter = f"set model.context {context // 2} (it is {context}), or take a smaller model"
    shard = "set parallel.shard -1, which divides the model among the ranks"
    shards = [shard] if runtime.ranks > 1 and layout.is_plain else []
    if phase == "building":
        return [*shards, "take a smaller model (model.layers, model.dim)"]
    if phase == "sampling":
        length = config.sample.max_length
        shown = f"set sample.max_length {max(length // 2, 1)} (it is {length})"
        return [shown, "set sample.prompts [] for no samples"]
    if phase == "evaluating":
        rows = config.evaluation.batch_size or micro
        if rows > 1 and layout.pipeline == 1:
            return [f"set evaluation.batch_size {rows // 2} (it is {rows})"]
        return [*shards, shorter]
    found = [_in_more_forwards(config, micro)] if micro > 1 else []
    if not config.training.gradient_checkpointing:
        found.append("set training.gradient_checkpointing true")
    return [*found, *shards, *([shorter] if micro == 1 else [])]


def _in_more_forwards(config: Config, micro: int) -> str:
    smaller = next(size for size in range(micro // 2, 0, -1) if micro % size == 0)
    free = " and training.accumulation null" if config.training.accumulation else ""
    return (
        f"set training.micro_batch_size {smaller}{free} (it is {micro}; the batch stays "
        f"{config.training.batch_size}, in more forwards)"
    )


def _snapshot(folder: Path, rank: int) -> str:
    """Write what CUDA's memory holds; return where, as a part of a sentence."""
    path = folder / "profile" / f"memory-{rank}.pickle"
    with suppress(OSError, RuntimeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
        return f" (what it held: {path}, for pytorch.org/memory_viz)"
    return ""
