"""Where a process finds its rank, and which device and arithmetic it takes."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from dtt.dist import Place, Runtime, choose_device, find_place
from dtt.errors import ConfigError, DataError
from dtt.precision import choose_precision, cpu_has_bf16

CPU = torch.device("cpu")
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_STEP_ID": "0",
}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, Place(0, 1, 0, 1, "none")),
        ({"RANK": "1"}, Place(0, 1, 0, 1, "none")),
        (TORCHRUN, Place(5, 8, 1, 4, "torchrun")),
        (OPEN_MPI, Place(3, 4, 1, 2, "Open MPI")),
        (MPICH, Place(2, 4, 0, 2, "MPICH")),
        (SLURM, Place(9, 16, 1, 8, "Slurm")),
        (SLURM | {"SLURM_NTASKS_PER_NODE": "8(x2)"}, Place(9, 16, 1, 8, "Slurm")),
        (SLURM | TORCHRUN, Place(5, 8, 1, 4, "torchrun")),  # torchrun inside of a Slurm job
        (SLURM | {"SLURM_STEP_ID": "batch"}, Place(0, 1, 0, 1, "none")),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}, Place(0, 1, 0, 1, "none")),
    ],
)
def test_find_place(environ: dict[str, str], place: Place) -> None:
    assert find_place(environ) == place


def test_a_rank_that_is_no_number() -> None:
    with pytest.raises(ConfigError, match="RANK=x and WORLD_SIZE=8 are not numbers"):
        find_place(TORCHRUN | {"RANK": "x"})


def test_alone_collectives_are_nothing() -> None:
    runtime = Runtime(Place(), CPU)
    assert runtime.is_main and (runtime.rank, runtime.ranks) == (0, 1)
    values = torch.tensor([1.0, 2.0])
    assert runtime.sum(values) is values and values.tolist() == [1.0, 2.0]
    assert runtime.on_main(lambda: 7) == 7
    with pytest.raises(DataError, match="empty"):
        runtime.on_main(fail)
    runtime.close()


def fail() -> None:
    raise DataError("empty")


def gpus(count: int, bf16: bool = True) -> object:
    """A machine with so many GPUs, as far as PyTorch says."""
    return patch.multiple(
        torch.cuda,
        is_available=lambda: count > 0,
        device_count=lambda: count,
        is_bf16_supported=lambda including_emulation: bf16,
    )


def test_choose_device() -> None:
    with gpus(2), patch.object(torch.backends.mps, "is_available", lambda: False):
        assert choose_device("auto", 1) == torch.device("cuda", 1)
        assert choose_device("cpu", 1) == CPU
        with pytest.raises(ConfigError, match="3 ranks on this machine, which has 2 GPUs"):
            choose_device("auto", 2)
        with pytest.raises(ConfigError, match="mps"):
            choose_device("mps")
    with gpus(0):
        with patch.object(torch.backends.mps, "is_available", lambda: True):
            assert choose_device("auto") == torch.device("mps")
        with patch.object(torch.backends.mps, "is_available", lambda: False):
            assert choose_device("auto") == CPU
        with pytest.raises(ConfigError, match="PyTorch sees no GPU"):
            choose_device("cuda")


def test_choose_precision() -> None:
    cuda = torch.device("cuda", 0)
    with gpus(1):
        assert choose_precision("auto", cuda)[0] == torch.bfloat16
        assert choose_precision("fp16", cuda) == (torch.float16, "as asked")
    with gpus(1, bf16=False):
        dtype, why = choose_precision("auto", cuda)
        assert dtype == torch.float16 and "no native bf16" in why
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert choose_precision(name, CPU) == (dtype, "as asked")
    expected = torch.bfloat16 if cpu_has_bf16() else torch.float32
    assert choose_precision("auto", CPU)[0] == expected
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with patch("dtt.precision.cpu_has_bf16", lambda has=has: has):
            assert choose_precision("auto", CPU)[0] == dtype
    with pytest.raises(ConfigError, match="fp16 on a CPU"):
        choose_precision("fp16", CPU)
