"""All measurements on a GPU in one call of under ten minutes.

Training of GPT-2 124M (tokens/s, share of the matrix-product peak, memory), generation, and a run
on tales. A part that fails says so and the next one goes on.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]
os.environ["PYTHONPATH"] = str(ROOT)  # for the processes that are started

import torch  # noqa: E402
from generate import cache_table, transformers_table  # noqa: E402
from quality import run  # noqa: E402
from shapes import QUICK, SHAPES, Shape  # noqa: E402
from table import matmul_peak, parser, print_heading, print_table, read_peak  # noqa: E402
from train_step import HEADS, compare  # noqa: E402

TRAINING = [
    "plain PyTorch: bf16",
    "plain PyTorch: bf16, fused AdamW",
    "plain PyTorch: bf16, compiled, fused AdamW",
    "dtt",
    "dtt: compiled",
]


def versions(device: str) -> list[list[str]]:
    """Return what matters for repeating the figures."""
    rows = [
        ["Python", platform.python_version()],
        ["torch", torch.__version__],
        ["CUDA", torch.version.cuda or "-"],
    ]
    if device == "cuda":
        asked = "name,driver_version,memory.total,clocks.max.sm,power.limit"
        shown = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        rows.append(["GPU, driver, memory, clock, power", shown.stdout.strip()])
    return rows


def limits(device: str, threads: int, quick: bool) -> None:
    print_table(["what", "version"], versions(device))
    read = read_peak(threads, device, quick=quick)
    peak = matmul_peak(torch.bfloat16, device, quick=quick)
    rows = [["bf16 matrix product, GFLOP/s", peak], ["reading memory, GB/s", read]]
    print_table(["limit", "measured"], rows)


def training(shape: Shape, options: Any) -> None:
    peak = matmul_peak(torch.bfloat16, options.device, quick=options.quick)
    names = [name for name in TRAINING if not (options.no_compile and "compiled" in name)]
    rows = compare(
        shape,
        names,
        peak,
        rounds=options.rounds or (1 if options.quick else 2),
        seconds=0.2 if options.quick else 5.0,
        threads=options.threads,
        device=options.device,
        nanogpt=None,
    )
    memory = ["peak memory"] * (options.device == "cuda")
    print(f"### Training, batch {shape.batch} x {shape.context}, MFU against the peak above\n")
    print_table([*HEADS, *memory], rows)


def generation(shape: Shape, options: Any) -> None:
    length, new, rounds = (4, 8, 1) if options.quick else (32, 128, 3)
    cache_table(shape, new, rounds, options.device)
    transformers_table(shape, length, new, rounds, options.device)


def tales(options: Any) -> None:
    """Train the default model on tales, ten times as long as the demo does."""
    with tempfile.TemporaryDirectory() as folder:
        found = run("tales-10x", None, Path(folder), options, seed=1)
    rows = [
        ["steps", found["step"]],
        ["seconds, with start and validation", found["seconds"]],
        ["bits/byte", f"{found['bits_per_byte']:.4f}"],
        ["above the floor", f"{found['above_floor']:.1%}"],
    ]
    print("### tales\n")
    print_table(["figure", "value"], rows)


def attempt(name: str, part: Callable[[], None]) -> bool:
    """Run one part and say how long it took; whatever happens in it, the others go on."""
    begin = time.perf_counter()
    try:
        part()
        print(f"_{name}: {time.perf_counter() - begin:.0f} s_\n", flush=True)
        return True
    except (Exception, SystemExit):
        print(f"**{name} failed:**\n\n```\n{traceback.format_exc()}```\n", flush=True)
        return False


def main() -> int:
    asked = parser(__doc__)
    asked.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    asked.add_argument("--batch", type=int, default=32, help="sequences of 1,024 tokens a step")
    asked.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parts = ["limits", "training", "generation", "tales"]
    asked.add_argument("--part", choices=parts, action="append", help="default: all")
    options = asked.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        asked.error("PyTorch sees no GPU here; --device cpu --quick tests this script without one")
    shape = replace(SHAPES["gpt2-124m"], batch=options.batch)
    if options.quick:
        shape = replace(QUICK, bias=True)
    print_heading("GPU", options.threads, options.quick)
    calls: dict[str, Callable[[], None]] = {
        "limits": lambda: limits(options.device, options.threads, options.quick),
        "training": lambda: training(shape, options),
        "generation": lambda: generation(shape, options),
        "tales": lambda: tales(options),
    }
    done = [attempt(name, calls[name]) for name in options.part or parts]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
