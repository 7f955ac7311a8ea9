"""Training on one GPU, in one call of under eight minutes: dtt against a plain PyTorch loop.

GPT-2's shapes of 124M, 350M and 1.3B parameters, and 124M with 8 experts of which a token passes
two, with contexts of 1,024 and 4,096. dtt computes in bf16 with compiled blocks; the plain loop
(`reference.py`, dense shapes only) is compiled whole, with autocast to bf16 and the fused AdamW.

MFU is the FLOPs of `dtt.metrics.flops`, as published MFU has them (PaLM, arxiv.org/abs/2204.02311,
appendix B: 6 N + 12 L H Q T, of experts those that a token passes), x tokens/s over the peak. It is
given against the best matrix product measured here, and against the maker's figure (dense bf16),
where it is known.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]  # before this folder, whose names are the same
os.environ["PYTHONPATH"] = str(ROOT)  # for the processes that are started

import torch  # noqa: E402
import train_step  # noqa: E402
from shapes import QUICK, Shape  # noqa: E402
from table import (  # noqa: E402
    in_process,
    matmul_peak,
    note,
    parser,
    print_heading,
    print_table,
    ratio,
    summarize,
    summary,
)

from dtt.metrics.peak import published  # noqa: E402

VOCABULARY = 50304
"""GPT-2's, rounded up to a multiple of 64, as nanoGPT has it."""
SHAPES = {
    "124M": Shape(12, 768, 12, 1024, 32, VOCABULARY, bias=False),
    "350M": Shape(24, 1024, 16, 1024, 16, VOCABULARY, bias=False),
    "1.3B": Shape(24, 2048, 16, 1024, 8, VOCABULARY, bias=False),
    "124M, 8 experts": Shape(12, 768, 12, 1024, 16, VOCABULARY, bias=False, experts=8),
}
SMALL = {"dense": QUICK, "8 experts": replace(QUICK, experts=8)}
"""Instead of them with --quick."""
LONG = 4
"""The longer context is so many times the other, with as many sequences less."""
OURS, PEER = "dtt: compiled", "plain PyTorch: bf16, compiled, fused AdamW"
QUICK_OURS, QUICK_PEER = "dtt", "plain PyTorch: bf16, fused AdamW"
"""With --quick nothing is compiled, which takes a minute on a CPU."""


def vendor_peak() -> float | None:
    """Return what this GPU's maker says of bf16, in GFLOP/s."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    found = published(name, torch.bfloat16)
    return None if found is None else found * 1e-9


def asked_for(quick: bool) -> Iterator[tuple[str, Shape]]:
    """Yield what is measured, the most telling first, since time may not be enough for all."""
    for times in (1, LONG):
        for name, shape in (SMALL if quick else SHAPES).items():
            yield name, replace(shape, context=times * shape.context, batch=shape.batch // times)


class Clock:
    """Says whether there is time for one more measurement like the longest so far."""

    def __init__(self, minutes: float) -> None:
        self._end, self._longest = time.perf_counter() + 60 * minutes, 0.0

    def allows(self) -> bool:
        return time.perf_counter() + self._longest < self._end

    def measure(self, variant: str, shape: Shape, options: Any) -> dict[str, float] | None:
        """Return seconds a step and GiB of one variant; None if it failed, as stderr explains."""
        begin, spec = time.perf_counter(), {"shape": asdict(shape), "variant": variant}
        seconds = 0.1 if options.quick else 4.0
        spec |= {"device": options.device, "threads": options.threads, "seconds": seconds}
        try:
            return in_process(train_step.__file__, spec)
        except SystemExit as failed:
            note(str(failed))
            return None
        finally:
            self._longest = max(self._longest, time.perf_counter() - begin)


def measured(
    name: str, shape: Shape, clock: Clock, peak: float, options: Any
) -> Iterator[list[Any]]:
    """Yield the rows of dtt and, for a dense shape, of its peer; stop when time is used up."""
    ours, peer = (QUICK_OURS, QUICK_PEER) if options.quick else (OURS, PEER)
    cells: dict[str, float] = {}
    label = f"{name}, {shape.batch} x {shape.context:,}"
    for variant in [peer] * (not shape.experts) + [ours]:
        if not clock.allows():
            note(f"no time left for {label}: {variant}")
            continue
        found = clock.measure(variant, shape, options)
        if found is None:
            yield [label, variant, "failed", *[None] * 5]
            continue
        speed = cells[variant] = shape.tokens / found["seconds"]
        note(f"{label}: {variant}: {speed:,.0f} tokens/s")
        against = ratio(speed, cells.get(peer)) if variant == ours else None
        gflops, said = speed * shape.flops() * 1e-9, vendor_peak()
        shares = [f"{gflops / limit:.1%}" if limit else None for limit in (peak, said)]
        yield [label, variant, against, speed, *shares, gflops / 1e3, f"{found['memory']:.1f} GiB"]
        if variant == ours:
            summarize(f"{label}: MFU, measured peak; to the plain loop", f"{shares[0]}; {against}")


def main() -> int:
    asked = parser(__doc__)
    asked.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    asked.add_argument("--minutes", type=float, default=8.0, help="start nothing after these")
    options = asked.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was measured (--quick --device cpu runs the same code)")
        return 0
    clock = Clock(options.minutes)
    print_heading("Training step on a GPU", options.threads, options.quick)
    peak, said = matmul_peak(torch.bfloat16, options.device, quick=options.quick), vendor_peak()
    limits = [
        ["bf16 matrix product, measured", peak / 1e3],
        ["the maker's figure", said and said / 1e3],
    ]
    print_table(["limit", "TFLOP/s"], limits)
    with summary(options.threads):
        rows = []
        for name, shape in asked_for(options.quick):
            note(f"{name}: {shape.parameters():,} parameters, {shape.tokens:,} tokens a step")
            rows += measured(name, shape, clock, peak, options)
        heads = ["model, sequences x context", "loop", "to the plain loop", "tokens/s"]
        rest = ["MFU, measured peak", "MFU, maker's", "TFLOP/s", "peak memory"]
        print_table([*heads, *rest], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
