"""What a process reads of its launcher: arrays, names of launches, its share of the cores."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from dtt.errors import ConfigError
from dtt.place import Array, Place, cores_of, find_array, launch_name

ARRAY = {
    "SLURM_ARRAY_JOB_ID": "77",
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_STEP": "2",
    "SLURM_ARRAY_TASK_COUNT": "5",
    "SLURM_JOB_ID": "80",
}


def test_tasks_of_an_array_are_counted_from_zero() -> None:
    assert find_array(ARRAY) == Array("77", 3, 5)  # of 1, 3, 5, 7, 9
    assert find_array({"SLURM_JOB_ID": "80"}) is None
    # `--array=0,5,100` has no step: the last seats are shared.
    odd = ARRAY | {"SLURM_ARRAY_TASK_ID": "100", "SLURM_ARRAY_TASK_STEP": "1"}
    assert find_array(odd) == Array("77", 4, 5)


@pytest.mark.parametrize("name", ["ID", "COUNT", "STEP"])
def test_an_array_that_makes_no_sense(name: str) -> None:
    with pytest.raises(ConfigError, match=f"SLURM_ARRAY_TASK_{name}=x"):
        find_array(ARRAY | {f"SLURM_ARRAY_TASK_{name}": "x"})
    with pytest.raises(ConfigError, match="no task of an array"):
        find_array(ARRAY | {f"SLURM_ARRAY_TASK_{name}": "0"})


@pytest.mark.parametrize(
    ("launcher", "environ", "other"),
    [
        ("Open MPI", {"PMIX_NAMESPACE": "prterun-a-1@1"}, {"PMIX_NAMESPACE": "prterun-a-2@1"}),
        (
            "Slurm",
            {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0"},
            {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "1"},
        ),
    ],
)
def test_launches_have_names(launcher: str, environ: dict[str, str], other: dict[str, str]) -> None:
    ranks = [Place(r, 2, r, 2, launcher) for r in range(2)]
    names = [launch_name(place, environ | {"X": str(place.rank)}, ["dtt"]) for place in ranks]
    assert names[0] == names[1] == launch_name(ranks[0], environ, ["dtt", "other"])
    assert launch_name(ranks[0], other, ["dtt"]) != names[0]


def test_without_a_name_the_command_line_is_the_launch() -> None:
    place, environ = Place(0, 2, 0, 2, "MPICH"), {"PMI_RANK": "0"}
    name = launch_name(place, environ, ["dtt", "a"])
    assert launch_name(Place(1, 2, 1, 2, "MPICH"), {"PMI_RANK": "1"}, ["dtt", "a"]) == name
    assert launch_name(place, environ, ["dtt", "b"]) != name


@pytest.mark.parametrize(
    ("place", "environ", "mine", "machine", "expected"),
    [
        (Place(), {}, 8, 8, 8),
        (Place(), {}, 4, 8, 4),
        (Place(0, 4, 0, 4, "MPICH"), {}, 8, 8, 2),  # not bound: they divide
        (Place(0, 2, 0, 2, "Open MPI"), {}, 1, 8, 1),  # bound to one core each
        (Place(0, 9, 0, 9, "MPICH"), {}, 8, 8, 1),
        (Place(0, 2, 0, 2, "Slurm"), {"SLURM_CPUS_PER_TASK": "3"}, 8, 8, 3),
        (Place(0, 2, 0, 2, "Slurm"), {"SLURM_CPUS_PER_TASK": "16"}, 4, 8, 4),
    ],
)
def test_cores_of_a_rank(
    place: Place, environ: dict[str, str], mine: int, machine: int, expected: int
) -> None:
    with patch("dtt.place.cores", lambda: mine), patch("os.cpu_count", lambda: machine):
        assert cores_of(place, environ) == expected
