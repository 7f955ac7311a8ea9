"""What a device could compute: its maker's figure where it is known, else a measured product."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dtt.reporting import is_out_of_memory

SECONDS = 0.2
"""How long the peak of an unknown device is measured, about."""
SIZES = {"cpu": (512, 1024), "cuda": (4096, 8192)}
"""Of the products: short ones too, which a busy machine is less likely to interrupt."""


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one device in one arithmetic, and where the figure is from."""

    flops: float
    source: str
    """`published` or `measured`."""


@dataclass(frozen=True)
class Rates:
    """TFLOP/s of dense matrix products with fp32 sums, by the maker; None: it has no such unit."""

    bf16: float | None
    fp16: float
    tf32: float | None
    fp32: float


def _rates(half: float, tf32: float | None, fp32: float, *, bf16: bool = True) -> Rates:
    return Rates(half if bf16 else None, half, tf32, fp32)


# Without sparsity: data sheets since Ampere often print twice the dense figure. The first name
# whose words are in the device's name counts, so that a variant stands before the plain one. GPUs
# of which the maker gives no such figures (A10G, H20, H800) are not here: they are measured.
PUBLISHED: dict[str, Rates] = {
    # NVIDIA data sheets of GB200 NVL72 and HGX B200: the same chips at up to 1200 W and 1000 W.
    "GB200": _rates(2500, 1250, 80),
    "B200": _rates(2250, 1100, 75),
    # NVIDIA Hopper white paper; data sheets of the H100 NVL and the H200 (SXM and NVL).
    "H200 NVL": _rates(835.5, 417.5, 60),
    "GH200": _rates(989.4, 494.7, 66.9),
    "H200": _rates(989.4, 494.7, 66.9),
    "H100 NVL": _rates(835.5, 417.5, 60),
    "H100 PCIe": _rates(756.5, 378, 51.2),
    "H100": _rates(989.4, 494.7, 66.9),
    # NVIDIA data sheets.
    "A100": _rates(312, 156, 19.5),
    "A800": _rates(312, 156, 19.5),
    "A30": _rates(165, 82, 10.3),
    "A40": _rates(149.7, 74.8, 37.4),
    "A10": _rates(125, 62.5, 31.2),
    # NVIDIA data sheets of L40S, L40 and L4; the last prints half precision with sparsity only.
    "L40S": _rates(362, 183, 91.6),
    "L40": _rates(181, 90.5, 90.5),
    "L4": _rates(121, 60, 30.3),
    # NVIDIA V100, V100S and T4 data sheets: no bf16, no tf32.
    "V100S": _rates(130, None, 16.4, bf16=False),
    "V100-PCIE": _rates(112, None, 14, bf16=False),
    "V100-SXM2": _rates(125, None, 15.7, bf16=False),
    "T4": _rates(65, None, 8.1, bf16=False),
    # Workstations: NVIDIA RTX A6000 and RTX 6000 Ada data sheets.
    "RTX A6000": _rates(154.8, 77.4, 38.7),
    "RTX 6000 Ada": _rates(364.2, 182.1, 91.1),
    # GeForce: appendices of NVIDIA's GA102, Ada and RTX Blackwell white papers, fp32 accumulate.
    "RTX 3090 Ti": _rates(80, 40, 40),
    "RTX 3090": _rates(71, 35.6, 35.6),
    "RTX 4090": _rates(165.2, 82.6, 82.6),
    "RTX 5090": _rates(209.5, 104.8, 104.8),
    # AMD Instinct data sheets. An MI250 or MI250X is two devices, of which this is one. From the
    # MI350X on tf32 is software.
    "MI250X": _rates(191.5, None, 47.9),
    "MI250": _rates(181, None, 45.3),
    "MI210": _rates(181, None, 45.3),
    "MI300A": _rates(980.6, 490.3, 122.6),
    "MI300X": _rates(1307.4, 653.7, 163.4),
    "MI325X": _rates(1307.4, 653.7, 163.4),
    "MI350X": _rates(2300, None, 144.2),
}


OTHER_CHIPS = ("Laptop", "Max-Q", "Mobile", "MIG", "D")
"""Words in the names of devices that have less than what they are called after (an RTX 4090 D)."""


def published(name: str, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """Return the FLOP/s that the maker of a GPU of this name gives; None if it is not known."""
    matches = (rates for part, rates in PUBLISHED.items() if _has_words(name, part))
    rates = next(matches, None)
    if rates is None or any(_has_words(name, word) for word in OTHER_CHIPS):
        return None
    kind = str(dtype).removeprefix("torch.")
    names = {"bfloat16": rates.bf16, "float16": rates.fp16, "float32": rates.fp32}
    found = rates.tf32 if kind == "float32" and tf32 and rates.tf32 else names.get(kind)
    return found * 1e12 if found else None


def _has_words(name: str, words: str) -> bool:
    return re.search(rf"\b{re.escape(words)}\b", name, re.IGNORECASE) is not None


def measure_again(device: torch.device, dtype: torch.dtype, known: Peak) -> Peak:
    """Return a higher peak if it can be measured now: something else may have been at work before.

    A published peak stays, and one that a run leaves too little memory to measure.
    """
    if known.source == "published":
        return known
    try:
        found = measure(device, dtype)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return known
    return Peak(max(known.flops, found), known.source)


@cache
def find_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Return the peak of one device for products in `dtype`.

    Where the maker's is not known it is measured, once in a process, in about SECONDS.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        tf32 = torch.get_float32_matmul_precision() != "highest"
        known = published(name, dtype, tf32=tf32)
        if known is not None:
            return Peak(known, "published")
    return Peak(measure(device, dtype), "measured")


def measure(
    device: torch.device,
    dtype: torch.dtype,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the most FLOP/s that a product x W^T reaches here within `seconds`, the threads of
    this process being what they are."""
    best, end = 0.0, clock() + seconds
    products = [_product(size, device, dtype) for size in SIZES.get(device.type, (2048,))]
    while clock() < end or not best:
        for size, product in products:
            begin = clock()
            product()
            _wait(device)
            best = max(best, 2.0 * size**3 / max(clock() - begin, 1e-9))
    return best


def _product(
    size: int, device: torch.device, dtype: torch.dtype
) -> tuple[int, Callable[[], Tensor]]:
    """Return a product of squares of this size, done once."""
    x, weight, out = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(3))

    def product() -> Tensor:
        return torch.mm(x, weight.t(), out=out)

    product()
    _wait(device)
    return size, product


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
