"""Training tokens per second: dtt out of the box against a plain PyTorch loop of the same shape.

Every measurement is a process of its own, since dtt sets up the C library's allocator for its
process and the plain loop must not gain by that. All have the same model, the same tokens and
AdamW; the best setting of the plain loop is what counts.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import reference
import torch
from shapes import QUICK, SHAPES, Shape
from table import (
    in_process,
    matmul_peak,
    median,
    note,
    parser,
    print_heading,
    print_table,
    ratio,
    take_turns,
    time_calls,
)

from dtt.config.optim import AdamW
from dtt.data.loader import Loader
from dtt.data.shards import FORMAT, Manifest, TokenStream, write_shard
from dtt.data.windows import ContiguousWindows
from dtt.dist import Place, start
from dtt.model.decoder import Decoder
from dtt.model.objective import Objective
from dtt.optim.build import build_optimizer
from dtt.parallel.model import ParallelModel
from dtt.precision import choose_precision
from dtt.training.batching import Division
from dtt.training.step import Stepper

STREAM = 1_000_000
OURS = "dtt"


def random_stream(folder: Path, vocab: int, tokens: int = STREAM) -> TokenStream:
    """Write random tokens as a shard of dtt and return its stream; the seed is fixed."""
    ids = np.random.default_rng(0).integers(vocab, size=tokens).astype("<u2")
    figures: dict[str, Any] = {"bytes": tokens, "unknown": 0, "bits": None}
    shard = write_shard(folder, "train-00000", ids, np.array([tokens], np.uint64), **figures)
    manifest = Manifest(FORMAT, {}, "", "<u2", vocab, shards={"train": [shard]})
    return TokenStream(folder, manifest, "train", 0)


def dtt_stepper(
    shape: Shape, threads: int, *, compiled: bool = False, device: str = "cpu"
) -> tuple[Decoder, Stepper]:
    """Build what `dtt train` builds for this model: precision, allocator and threads as it does."""
    runtime = start(Place(), device, threads)
    model = Decoder(shape.settings())
    model.init_weights(0)
    dtype, why = choose_precision("auto", runtime.device)
    note(f"dtt computes in {dtype}: {why}")
    model.compute_in(dtype).to(runtime.device)
    if compiled:
        for block in model.blocks:
            block.compile()
    stepper = Stepper(
        model=ParallelModel.alone(Objective(model).train(), runtime),
        optimizer=build_optimizer(AdamW(), model.named_parameters()),
        runtime=runtime,
        division=Division(shape.batch, 1),
        seed=0,
        grad_clip=1.0,
        scaler=torch.amp.GradScaler(runtime.device.type, enabled=dtype == torch.float16),
    )
    return model, stepper


def dtt_step(stepper: Stepper, shape: Shape, stream: TokenStream) -> Callable[[], object]:
    """Return a function that does one training step as the loop of `dtt train` does."""
    windows = [ContiguousWindows(stream, shape.context, 0)]
    pin = stepper.runtime.device.type == "cuda"
    batches = Loader(windows, shape.batch, 0, pin=pin).iter_from(0)
    done = 0

    def step() -> object:
        nonlocal done
        result = stepper.step(next(batches), done)
        stepper.update(1.0)
        done += 1
        # On a CPU the loop reads the figures of every step.
        return result.totals.tolist() if result.totals.device.type == "cpu" else result.totals

    return step


def work(spec: dict[str, Any]) -> dict[str, float]:
    """Measure one variant in this process."""
    shape, device, threads = Shape(**spec["shape"]), spec["device"], spec["threads"]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        stream = random_stream(Path(folder), shape.vocab)
        maker, _, name = spec["variant"].partition(": ")
        step: Callable[[], object]
        if maker == OURS:
            _, stepper = dtt_stepper(shape, threads, compiled=name == "compiled", device=device)
            step = dtt_step(stepper, shape, stream)
        else:
            tokens = np.memmap(Path(folder) / "train-00000.bin", dtype="<u2", mode="r")
            setting = reference.SETTINGS[name]
            torch.backends.cuda.matmul.allow_tf32 = True  # as nanoGPT's train.py has it
            model = (
                reference.nanogpt(spec["nanogpt"], shape)
                if maker == "nanoGPT"
                else reference.GPT(shape)
            )
            step = reference.training_step(model, shape, setting, tokens, device)
        cuda = device.startswith("cuda")
        seconds = time_calls(
            step,
            seconds=spec["seconds"],
            warmup=10 if cuda else 2,
            block=10 if cuda else 1,
            device=device,
        )
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return {"seconds": median(seconds), "memory": memory}


def variants(settings: list[str], folder: str | None) -> list[str]:
    """Return what is measured, in its order; `folder` is nanoGPT's."""
    makers = ["plain PyTorch", *(["nanoGPT"] if folder else [])]
    return [*(f"{maker}: {name}" for maker in makers for name in settings), OURS]


def compare(
    shape: Shape,
    names: list[str],
    peak: float,
    *,
    rounds: int,
    **spec: Any,
) -> list[list[Any]]:
    """Measure all variants of one shape in turn and return the rows of its table."""
    memory: dict[str, float] = {}

    def measure(name: str) -> float:
        asked = {**spec, "shape": asdict(shape), "variant": name}
        found = in_process(__file__, asked)
        memory[name] = max(memory.get(name, 0.0), found["memory"])
        return shape.tokens / float(found["seconds"])

    speeds = take_turns(names, measure, rounds)
    peers = [name for name in names if not name.startswith(OURS)]
    first = median(speeds[peers[0]])
    best = max(median(speeds[name]) for name in peers)
    rows: list[list[Any]] = []
    for name in names:
        middle = median(speeds[name])
        gflops = middle * shape.flops() * 1e-9
        share = f"{gflops / peak:.0%}"
        row = [name, max(speeds[name]), middle, gflops, share, ratio(middle, first)]
        row.append(ratio(middle, best))
        rows.append(row + [f"{memory[name]:.1f} GiB"] * (memory[name] > 0))
    return rows


HEADS = [
    "setting",
    "tokens/s, best",
    "median",
    "GFLOP/s",
    "of bf16 peak",
    "to the first",
    "to the peer's best",
]


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
        return
    asked = parser(__doc__)
    asked.add_argument("--shape", choices=SHAPES, action="append", help="default: all three")
    asked.add_argument("--nanogpt", metavar="DIR", help="also measure the model.py in DIR")
    asked.add_argument(
        "--setting", choices=reference.SETTINGS, action="append", help="of the peer; default: all"
    )
    asked.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    asked.add_argument("--seconds", type=float, default=10.0, help="per measurement, after warm-up")
    options = asked.parse_args()
    quick, rounds = options.quick, options.rounds or (1 if options.quick else 3)
    settings = options.setting or [
        name
        for name, setting in reference.SETTINGS.items()
        if not (setting.compiled and (options.no_compile or quick))
    ]
    names = variants(settings, options.nanogpt)

    torch.set_num_threads(options.threads)
    print_heading("Training step", options.threads, quick)
    peaks = {d: matmul_peak(getattr(torch, d), quick=quick) for d in ("float32", "bfloat16")}
    print_table(["limit", "GFLOP/s"], [[f"{d} matrix product", p] for d, p in peaks.items()])
    for shape_name in options.shape or list(SHAPES):
        shape = QUICK if quick else SHAPES[shape_name]
        rows = compare(
            shape,
            names,
            peaks["bfloat16"],
            rounds=rounds,
            nanogpt=options.nanogpt,
            seconds=0.2 if quick else options.seconds,
            threads=options.threads,
            device="cpu",
        )
        print(
            f"### {shape_name}: {shape.parameters():,} parameters, {shape.tokens:,} tokens a step\n"
        )
        print_table(HEADS, rows)


if __name__ == "__main__":
    main()
