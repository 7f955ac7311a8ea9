"""Ranks for a benchmark: forked processes of one thread each, which exchange or only seem to."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch._dynamo  # optimizers import it: once here, and not on every rank
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh  # noqa: F401  the same
from torch.distributed.fsdp import fully_shard  # noqa: F401  the same
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from dtt.config.schema import Config
from dtt.data.loader import Batch
from dtt.dist import Place, Runtime, leave, start
from dtt.parallel.layout import resolve
from dtt.precision import choose_precision
from dtt.training.build import build_model, build_stepper
from dtt.training.step import Stepper


@dataclass(frozen=True)
class Rank:
    """One of the ranks, as `work` of `fork_ranks` is given it."""

    runtime: Runtime
    barrier: Any
    """Of multiprocessing: it holds also where collectives do nothing."""


def fork_ranks(work: Callable[[Rank], Any], ranks: int, *, exchange: bool = True) -> list[Any]:
    """Call `work` on so many ranks of one thread and return by rank what it returned, as JSON.

    Without `exchange` the ranks' collectives are those of PyTorch's "fake" backend, which come
    back at once: results are garbage, and the time is that of computing alone. The process that
    calls this must not have computed anything, since OpenMP does not survive a fork.
    """
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(ranks)
    with tempfile.TemporaryDirectory(prefix="dtt-ranks-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
        probe.close()
        processes = [
            context.Process(target=_rank, args=(work, r, ranks, exchange, barrier, folder))
            for r in range(ranks)
        ]
        for process in processes:
            process.start()
        while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
            multiprocessing.connection.wait([p.sentinel for p in processes if p.is_alive()], 1.0)
        codes = [process.exitcode for process in processes]
        for process in processes:  # one that failed keeps the others waiting
            process.kill()
            process.join()
        if any(codes):
            raise SystemExit(f"the ranks ended with {codes}: see above")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


def _rank(
    work: Callable[[Rank], Any], rank: int, ranks: int, exchange: bool, barrier: Any, folder: str
) -> NoReturn:
    try:
        place = Place(rank, ranks, rank, ranks, "benchmark")
        if exchange:
            runtime = start(place, "cpu", 1)
        else:
            runtime = Runtime(place, start(Place(), "cpu", 1).device)
            dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
            # With this alone do the ranks of a pipeline agree that they know all shapes.
            dist.recv = lambda tensor, *rest, **named: tensor.fill_(1)
        found = work(Rank(runtime, barrier))
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
    except BaseException:
        print(f"rank {rank} of {ranks}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        leave(1)
    leave(0)


def stepper_of(config: Config, runtime: Runtime) -> Stepper:
    """Build what `dtt train` builds for this configuration on a rank."""
    layout = resolve(config.parallel, config.model, runtime.ranks)
    dtype, _ = choose_precision(config.training.precision, runtime.device)
    model = build_model(config, dtype)
    stepper = build_stepper(model, layout, config, runtime, dtype)
    called = stepper.model.called
    if isinstance(called, DistributedDataParallel) and dist.get_backend() == "fake":
        called.register_comm_hook(None, _as_it_is)  # it wants a result, which "fake" has not
    return stepper


def _as_it_is(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses them as text
    found: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    found.set_result(bucket.buffer())
    return found


def random_share(config: Config, stepper: Stepper) -> Batch:
    """Return this rank's share of a step of random tokens."""
    rows, context = config.training.batch_size, config.model.context
    assert config.model.vocab_size is not None
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.model.vocab_size, (rows, context + 1), generator=draw)
    index, shares = stepper.model.data_rank, stepper.model.layout.data
    mine = tokens[index * rows // shares : (index + 1) * rows // shares]
    inputs, targets = mine[:, :-1].contiguous(), mine[:, 1:].contiguous()
    return Batch(inputs, targets, None, rows * context, ())
