"""Which arithmetic a machine computes natively."""

from __future__ import annotations

import platform

import torch

from dtt.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the compute type, and in a few words why it was chosen."""
    if name == "fp16" and device.type == "cpu":
        raise ConfigError(
            "training.precision: fp16 on a CPU is slower than fp32 and less exact",
            "use auto, bf16 or fp32",
        )
    if name != "auto":
        return DTYPES[name], "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU computes bf16 natively"
        return torch.float16, "this GPU has no native bf16; fp16 with loss scaling"
    if device.type == "cpu" and cpu_has_bf16():
        return torch.bfloat16, "this CPU multiplies bf16 natively"
    return torch.float32, f"no native bf16 on this {device.type}"


def cpu_has_bf16() -> bool:
    """Whether the CPU has bf16 matrix instructions (AVX512_BF16, AMX, or Arm's)."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
