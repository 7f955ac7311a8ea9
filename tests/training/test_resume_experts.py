"""A run of a model with experts goes on bitwise, also in how its experts are balanced."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from small_run import assert_same_run, command, final_tensors, flags

pytestmark = pytest.mark.processes
RUN = Path("runs/small")


@pytest.mark.parametrize("balance", ["bias", pytest.param("loss", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_killed_with_experts(folder: Path, balance: str, ranks: str) -> None:
    changes: dict[str, str | None] = {
        "model.experts.number": "4",
        "model.experts.balance": balance,
        "model.experts.bias_rate": "0.05",
        "parallel.world_size": ranks,
        "parallel.restarts": "0",
    }
    words = ["train", *flags(changes)]
    assert command(folder, ["train", *flags(changes | {"name": "whole"})]).code == 0
    assert command(folder, words, die=(0, 14), slow=0.03).code in (-signal.SIGKILL, 7)
    assert command(folder, words).code == 0
    assert_same_run(RUN, Path("runs/whole"))
    biases = [t for n, t in final_tensors(RUN).items() if n.endswith("router.bias")]
    assert len(biases) == 2 * (balance == "bias")
    assert not biases or any(bias.any() for bias in biases)
