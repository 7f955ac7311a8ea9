"""The last checks do what training does: compile, go forward and backward, and train on two ranks
what one rank trains."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from dtt.config.schema import Config
from dtt.doctor.finding import Finding, Subject, failed, ok, warning
from dtt.doctor.software import find_compiler

NEAR = 0.5
"""Nats that the loss of an untrained model may be from ln(vocabulary)."""


def check_compiler(subject: Subject) -> Iterator[Finding]:
    compiler, gpu = find_compiler(), bool(subject.gpus)
    seconds = subject.bench.run(compile_something, gpu, seconds=50) if compiler else 0.0
    yield judge_compiler(compiler, seconds, subject.config.training.compile)


def compile_something(gpu: bool) -> float:
    """Compile a small function anew, check what it returns, and return the seconds it took."""
    import time

    import torch

    # A cache of its own: what another program has compiled proves nothing.
    with tempfile.TemporaryDirectory(prefix="dtt-doctor-") as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = folder
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        x = torch.linspace(-1, 1, 1000, device="cuda" if gpu else "cpu")
        start = time.perf_counter()
        # Without an own compilation of each instruction set's test, which takes most of the time:
        # the function is compiled for it, and so tests it.
        quicker: dict[str, Any] = {"cpp.vec_isa_ok": True}
        found = torch.compile(lambda x: torch.sin(x) * 2 + x, options=quicker)(x)
        torch.testing.assert_close(found, torch.sin(x) * 2 + x)
        return time.perf_counter() - start


def judge_compiler(compiler: str | None, seconds: float, wanted: bool) -> Finding:
    """Judge the compiler; without one only --compile does not work."""
    if compiler is not None:
        shown = f"torch.compile made a function with {compiler}"
        return ok(shown, {"compiler": compiler, "compile_seconds": round(seconds, 2)})
    return (failed if wanted else warning)(
        "there is no C++ compiler (g++, clang++, or what CXX names)",
        "apt install g++ (or conda install gxx); without it leave --compile off",
        {"compiler": None},
    )


def check_one_rank(subject: Subject) -> Iterator[Finding]:
    yield judge_losses(subject.bench.run(train_alone, subject.config, seconds=45))


def train_alone(config: Config) -> dict[str, Any]:
    """Train the run's kind of model, made small, on this machine's device, in its precision."""
    import torch

    from dtt.dist import Place, Runtime, choose_device
    from dtt.precision import choose_precision
    from dtt.verification.cases import ALONE, VOCABULARY, small
    from dtt.verification.training import train

    device = choose_device(config.training.device)
    _, why = choose_precision(config.training.precision, device)
    tiny = small(config, ALONE)
    training = tiny.training.model_copy(update={"precision": config.training.precision})
    torch.set_num_threads(1)
    found, _ = train(tiny.model_copy(update={"training": training}), Runtime(Place(), device), None)
    return {
        "device": str(device),
        "precision": f"{choose_precision(config.training.precision, device)[0]}".split(".")[-1],
        "why": why,
        "vocabulary": VOCABULARY,
        "losses": [round(float(loss), 4) for loss in found["losses"]],
        "norms": [round(float(norm), 4) for norm in found["norms"]],
    }


def judge_losses(found: dict[str, Any]) -> Finding:
    """Judge the losses of a few steps: finite, and at first what an untrained model has."""
    losses, expected = found["losses"], math.log(found["vocabulary"])
    shown = (
        f"{len(losses)} steps on {found['device']} in {found['precision']}: first loss "
        f"{losses[0]:.3f}, ln(vocabulary) is {expected:.3f}"
    )
    if not all(map(math.isfinite, [*losses, *found["norms"]])):
        return failed(
            f"{shown}; a loss or gradient is not finite",
            "train with --precision fp32; if that is no better, this machine computes wrongly",
            found,
        )
    if abs(losses[0] - expected) > NEAR:
        return failed(
            f"{shown}; they should be near each other",
            "do not train on this machine: it computes wrongly (try --precision fp32, another "
            "device, or another build of PyTorch)",
            found,
        )
    return ok(shown, found)


def check_two_ranks(subject: Subject) -> Iterator[Finding]:
    yield judge_ranks(subject.bench.run(compare_ranks, subject.config, seconds=60))


def compare_ranks(config: Config) -> dict[str, Any]:
    """Train the same on one rank and on two, on this machine's CPU; how far they are apart."""
    from dtt.verification.cases import ALONE, CASES
    from dtt.verification.report import compare
    from dtt.verification.training import run

    two = next(case for case in CASES if case.ranks == 2)
    (alone,) = run(config, [ALONE])
    (found,) = run(config, [two], alone)
    apart = compare(found, alone)
    return {
        "steps": len(alone["losses"]),
        "loss_difference": apart.loss,
        "gradient_difference": apart.gradient,
        "same": apart.within(two),
    }


def judge_ranks(found: dict[str, Any]) -> Finding:
    """Judge how far two ranks are from one."""
    shown = (
        f"{found['steps']} steps on 1 and on 2 ranks: losses differ by "
        f"{found['loss_difference']:.0e}, gradients by {found['gradient_difference']:.0e}"
    )
    if not found["same"]:
        return failed(
            shown,
            "do not trust runs of several ranks here: `dtt verify parallel` shows which layouts",
            found,
        )
    return ok(shown, found)
