"""When memory does not suffice: which setting to lower, and to what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from dtt.config.schema import Config
from dtt.dist import Runtime
from dtt.errors import OutOfMemoryError
from dtt.parallel.layout import resolve
from dtt.reporting import is_out_of_memory
from dtt.training.batching import divide

HISTORY = 100_000
"""Allocations that a snapshot remembers, with the lines of code that asked for them."""


@contextmanager
def memory_explained(config: Config, runtime: Runtime, folder: Path) -> Iterator[None]:
    """Turn a lack of memory inside into an OutOfMemoryError that says what to lower to what.

    On CUDA, what memory holds is left in RUN/profile for pytorch.org/memory_viz, with the
    history of allocations where logging.profile is on.
    """
    cuda = runtime.device.type == "cuda"
    if cuda and config.logging.profile:
        torch.cuda.memory._record_memory_history(max_entries=HISTORY)
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error) or isinstance(error, OutOfMemoryError):
            raise
        left = _snapshot(folder, runtime.rank) if cuda else ""
        text = " ".join(str(error).split())[:200] or "no details"
        what = f"out of memory on {runtime.device}: {text}{left}"
        raise OutOfMemoryError(what, "; or ".join(remedies(config, runtime))) from error


def remedies(config: Config, runtime: Runtime) -> list[str]:
    """Return what lowers the memory that a step needs, what costs least first."""
    layout = resolve(config.parallel, config.model, runtime.ranks)
    division = divide(config.training, layout.data, layout.pipeline)
    micro, found = division.micro_batch_size, []
    if micro > 1:
        smaller = next(size for size in range(micro // 2, 0, -1) if micro % size == 0)
        free = " and training.accumulation null" if config.training.accumulation else ""
        found.append(
            f"set training.micro_batch_size {smaller}{free} (it is {micro}; the batch stays "
            f"{config.training.batch_size}, in more forwards)"
        )
    if not config.training.gradient_checkpointing:
        found.append("set training.gradient_checkpointing true")
    if runtime.ranks > 1 and layout.is_plain:
        found.append("set parallel.shard -1, which divides the model among the ranks")
    if micro == 1:
        context = config.model.context
        found.append(f"set model.context {context // 2} (it is {context}), or take a smaller model")
    return found


def _snapshot(folder: Path, rank: int) -> str:
    """Write what CUDA's memory holds; return where, as a part of a sentence."""
    path = folder / "profile" / f"memory-{rank}.pickle"
    with suppress(OSError, RuntimeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
        return f" (what it held: {path}, for pytorch.org/memory_viz)"
    return ""
