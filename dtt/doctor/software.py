"""Versions: of Python, of the packages that dtt needs, of PyTorch's build against the driver."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtt.doctor import gpu
from dtt.doctor.finding import Finding, Subject, failed, ok, skipped, warning
from dtt.version import __version__

PYTHON = (3, 10)
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def check_python(subject: Subject) -> Iterator[Finding]:
    yield judge_python(sys.version_info[:3])


def judge_python(version: tuple[int, ...]) -> Finding:
    text = ".".join(map(str, version))
    if version < PYTHON:
        return failed(text, f"install Python {PYTHON[0]}.{PYTHON[1]} or newer", {"version": text})
    return ok(f"{text}, {platform.system()} {platform.machine()}", {"version": text})


def check_packages(subject: Subject) -> Iterator[Finding]:
    try:
        requirements = importlib.metadata.requires("dtt") or []
    except importlib.metadata.PackageNotFoundError:
        yield skipped("dtt is not installed as a package, so what it needs is not recorded")
        return
    wanted = dict(needed(requirements))
    yield judge_packages(wanted, {name: installed(name) for name in wanted})


def judge_packages(wanted: dict[str, str], found: dict[str, str | None]) -> Finding:
    """Compare versions with the bounds that dtt states."""
    shown = ", ".join(f"{n} {v or 'missing'}" for n, v in {"dtt": __version__, **found}.items())
    wrong = [f"'{n}{wanted[n]}'" for n, v in found.items() if v is None or not fits(v, wanted[n])]
    figures = {"dtt": __version__, **found}
    if wrong:
        return failed(shown, f"pip install {' '.join(wrong)}", figures)
    return ok(shown, figures)


def check_extras(subject: Subject) -> Iterator[Finding]:
    try:
        requirements = importlib.metadata.requires("dtt") or []
    except importlib.metadata.PackageNotFoundError:
        yield skipped("dtt is not installed as a package, so its extras are not recorded")
        return
    logging, sources = subject.config.logging, subject.config.data
    parts = [part.source.name for part in sources.mixture] or [sources.source.name]
    used = {
        "data": "hub" in parts,
        "mlflow": "mlflow" in logging.trackers,
        "tensorboard": logging.tensorboard,
        "wandb": logging.wandb,
    }
    wanted = {extra for extra, on in used.items() if on}
    found = {
        extra: [name for name, _ in needed(requirements, extra) if installed(name) is None]
        for extra in sorted({"data", "dask", "plot", "tensorboard", "wandb"} | wanted)
    }
    yield judge_extras(found, wanted)


def judge_extras(missing: dict[str, list[str]], used: set[str]) -> Finding:
    """Say which extras are there; one that the run uses must be."""
    there = [extra for extra, names in missing.items() if not names]
    lacking = [extra for extra, names in missing.items() if names]
    shown = f"installed: {', '.join(there) or 'none'}"
    if lacking:
        shown += f"; not installed: {', '.join(lacking)}"
    figures = {"installed": there, "missing": lacking}
    if wrong := [extra for extra in lacking if extra in used]:
        names = ", ".join(name for extra in wrong for name in missing[extra])
        return failed(
            f"{shown}; this run needs {names}", f"pip install 'dtt[{','.join(wrong)}]'", figures
        )
    return ok(shown, figures)


def check_pytorch(subject: Subject) -> Iterator[Finding]:
    build = subject.bench.run(describe_pytorch, seconds=60)
    smi = gpu.ask_nvidia_smi()
    build["driver"] = smi[0]["driver"] if smi else None
    build["gpus_of_machine"] = len(smi) or int(DRIVER_FILE.exists())
    yield judge_pytorch(build)


def describe_pytorch() -> dict[str, Any]:
    """PyTorch's build, as it says itself."""
    import warnings

    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    nccl = None
    if torch.version.cuda and torch.distributed.is_nccl_available():
        version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        nccl = ".".join(map(str, version))
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": nccl,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,  # type: ignore[no-untyped-call]
        "gpus": count,
        "reason": str(said[-1].message).split("(Triggered")[0].strip() if said else "",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gloo": torch.distributed.is_gloo_available(),
    }


def judge_pytorch(build: dict[str, Any]) -> Finding:
    """Compare PyTorch's build with the machine that it is on."""
    shown = f"{build['torch']}, kernels for {build['cpu']}"
    if build["cuda"]:
        shown += f", CUDA {build['cuda']}, NCCL {build['nccl'] or 'missing'}"
        shown += f", driver {build['driver']}" if build["driver"] else ""
    else:
        shown += ", no CUDA in this build"
    machine = build["gpus_of_machine"]
    if machine and not build["cuda"]:
        return warning(
            f"{shown}, but this machine has an NVIDIA GPU",
            "install a CUDA build of PyTorch (https://pytorch.org/get-started/locally)",
            build,
        )
    if machine and not build["gpus"]:
        return failed(
            f"{shown}; PyTorch sees no GPU{': ' * bool(build['reason'])}{build['reason']}",
            f"update the driver to one that has CUDA {build['cuda']}, or install a build of "
            "PyTorch for your driver; check CUDA_VISIBLE_DEVICES",
            build,
        )
    if not build["gloo"] or (build["gpus"] > 1 and not build["nccl"]):
        lacking = "gloo" if not build["gloo"] else "NCCL"
        return failed(f"{shown}; no {lacking}", "install the official build of PyTorch", build)
    return ok(shown, build)


def needed(requirements: list[str], extra: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name, bounds) of the requirements of an extra, or of those without one.

    What concerns the version of Python is left out: pip has decided that.
    """
    for line in requirements:
        text, _, marker = line.partition(";")
        match = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", marker)
        if (match[1] if match else "") != extra or "python_version" in marker:
            continue
        name = re.match(r"\s*([\w.-]+)(?:\[[^\]]*\])?\s*\(?([^)]*)\)?", text)
        if name and name[1] != "dtt":
            yield name[1], name[2].replace(" ", "")


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def fits(version: str, bounds: str) -> bool:
    """Whether a version is within bounds such as >=13,<16."""
    for operator, bound in re.findall(r"(>=|<)([\d.]+)", bounds):
        if (_numbers(version) >= _numbers(bound)) != (operator == ">="):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu as (2, 13)."""
    match = re.match(r"\d+(\.\d+)*", version)
    found = [int(part) for part in match[0].split(".")] if match else []
    while found and not found[-1]:
        found.pop()
    return tuple(found)


def find_compiler() -> str | None:
    """Return the C++ compiler that torch.compile would use, or None."""
    import os

    names = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    return next((path for name in names if name and (path := shutil.which(name))), None)
