"""What every benchmark here shares: the machine line, the measured limit, rounds, the table."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SUMMARY = "DTT_BENCHMARK_SUMMARY"


def parser(text: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    found = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--quick", action="store_true", help="seconds instead of minutes: a test")
    found.add_argument("--rounds", type=int, help="how often each variant is measured, in turn")
    found.add_argument("--threads", type=int, default=cores(), help="CPU threads (default: cores)")
    return found


def cores() -> int:
    """Return the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def processor() -> str:
    """Return the name of the CPU as the system knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine_line(threads: int) -> str:
    """Say on what, with what and when the figures below were measured."""
    parts = [
        processor(),
        f"{cores()} cores",
        f"{threads} threads",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
        datetime.date.today().isoformat(),
    ]
    if torch.cuda.is_available():
        parts.insert(0, torch.cuda.get_device_name())
    return ", ".join(parts)


def print_heading(title: str, threads: int, quick: bool) -> None:
    """Print a benchmark's title and the machine line."""
    print(f"## {title}\n\n{machine_line(threads)}")
    if quick:
        print("\n**--quick: these figures only show that the benchmark runs.**")
    print(flush=True)


def print_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a Markdown table, padded so that it also reads well as text."""
    lines = [list(heads), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        cells = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        print(f"| {' | '.join(cells)} |")
    print(flush=True)


def summarize(what: str, reached: str, wanted: str = "reported") -> None:
    """Keep a row for the one table at the end (`summary`), whose file the environment names."""
    if path := os.environ.get(SUMMARY):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([what, reached, wanted]) + "\n")


@contextmanager
def summary(threads: int) -> Iterator[None]:
    """Print at the end the rows that `summarize` was given, here and in processes of this one."""
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as file:
        os.environ[SUMMARY] = file.name
        yield
        rows = [json.loads(line) for line in file]
    print(f"## All of it\n\n{machine_line(threads)}\n")
    print_table(["what", "reached", "to be reached"], rows)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def ratio(ours: float, theirs: float | None) -> str:
    """Return ours / theirs as a cell."""
    return f"{ours / theirs:.2f}x" if theirs else "-"


def matmul_peak(dtype: torch.dtype, device: str = "cpu", *, quick: bool = False) -> float:
    """Return the most GFLOP/s that a matrix product reaches here: the limit of a training step."""
    sizes = [(2048, 2048, 2048), (4096, 768, 3072), (4096, 1536, 384), (4096, 4096, 1024)]
    if device != "cpu":
        sizes = [(8192, 8192, 8192), (16384, 8192, 4096)]
    if quick:
        sizes = [(256, 256, 256)]
    best = 0.0
    for m, k, n in sizes:
        a = torch.randn(m, k, device=device, dtype=dtype)
        # x W^T, the layout of a linear layer.
        b = torch.randn(n, k, device=device, dtype=dtype).t()
        out = torch.empty(m, n, device=device, dtype=dtype)

        def product(a: Any = a, b: Any = b, out: Any = out) -> None:
            torch.mm(a, b, out=out)

        seconds = time_calls(product, seconds=0.05 if quick else 1.0, warmup=3, device=device)
        best = max(best, 2e-9 * m * k * n / min(seconds))
    return best


def read_peak(threads: int, device: str = "cpu", *, quick: bool = False) -> float:
    """Return the GB/s at which memory is read: the limit of generating one text."""
    torch.set_num_threads(threads)
    size = 1 << (16 if quick else 26)
    values = torch.ones(size, device=device)
    samples = time_calls(
        lambda: torch.dot(values, values), seconds=0.05 if quick else 1.0, device=device
    )
    return 4e-9 * size / min(samples)


def time_calls(
    call: Callable[[], object],
    *,
    seconds: float,
    warmup: int = 2,
    least: int = 3,
    block: int = 1,
    device: str = "cpu",
) -> list[float]:
    """Return the seconds of each call, for about `seconds` and at least `least` times.

    A sample is the mean of `block` calls, so that a GPU need not be waited for at each.
    """
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    for _ in range(warmup):
        call()
    wait()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < least or time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(block):
            call()
        wait()
        samples.append((time.perf_counter() - begin) / block)
    return samples


def in_process(script: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Run `python script --worker SPEC` and return the JSON object on its last line.

    A process of its own for each measurement: allocator settings and compiled code stay in it.
    """
    command = [sys.executable, script, "--worker", json.dumps(spec)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{Path(script).name}: the measurement of {spec} failed")
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(
    variants: Sequence[str], measure: Callable[[str], float], rounds: int
) -> dict[str, list[float]]:
    """Measure every variant once per round, so that a change of the machine hits all alike."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in variants:
            figure = measure(name)
            found[name].append(figure)
            note(f"round {number + 1}/{rounds}  {name}: {figure:.4g}")
    return found


def note(text: str) -> None:
    """Say how far it is, on stderr: the table alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)
