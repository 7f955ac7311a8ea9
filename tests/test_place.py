"""Where a process finds its rank and the meeting point, under every launcher that there is."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from dtt.errors import ConfigError
from dtt.nodelist import expand_counts, expand_nodes
from dtt.place import PORTS, Place, Point, find_place, find_point

# As Slurm 22.05 sets them for `srun -N2 -n3`, for its task 2.
SLURM = {
    "SLURMD_NODENAME": "node2",
    "SLURM_GTIDS": "2",
    "SLURM_JOB_ID": "2",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.99",  # of the login node: rank 0 is not there
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_TASKS_PER_NODE": "2,1",
}
# The same for `srun -N2 -n4 -m cyclic`, task 2.
CYCLIC = SLURM | {
    "SLURMD_NODENAME": "node1",
    "SLURM_DISTRIBUTION": "cyclic",
    "SLURM_GTIDS": "0,2",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
# As MPICH 5.0.2 sets them for `mpirun -n 2`, rank 1.
MPICH = {
    "HYDI_CONTROL_FD": "7",
    "MPI_LOCALNRANKS": "2",
    "MPI_LOCALRANKID": "1",
    "PMI_FD": "11",
    "PMI_HOSTNAME": "node1",
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
}
# As Open MPI 5.0.11 sets them for `mpirun -n 2`, rank 1.
OPEN_MPI = {
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "PMIX_HOSTNAME": "node1",
    "PMIX_NAMESPACE": "prterun-node1-23023@1",
    "PMIX_RANK": "1",
}
# As torchrun 2.13 sets them with --nnodes 2 --nproc-per-node 2.
TORCHRUN = {
    "GROUP_RANK": "1",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
    "RANK": "3",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_RUN_ID": "j",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "WORLD_SIZE": "4",
}
TWO_HOSTS = {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}


def point(environ: dict[str, str]) -> Point:
    return find_point(find_place(environ), environ)


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        (SLURM, Place(2, 3, 0, 1, "Slurm")),
        (SLURM | {"SLURM_NODEID": "0", "SLURM_PROCID": "1"}, Place(1, 3, 0, 2, "Slurm")),
        (CYCLIC, Place(2, 4, 1, 2, "Slurm")),
        # srun --mpi=pmi2 sets these two, and nothing else that MPICH does
        (SLURM | {"PMI_RANK": "2", "PMI_SIZE": "3"}, Place(2, 3, 0, 1, "Slurm")),
        # mpirun of MPICH in a Slurm job starts its proxies by srun: their step is not the ranks'
        (SLURM | MPICH, Place(1, 2, 1, 2, "MPICH")),
        (SLURM | OPEN_MPI, Place(1, 2, 1, 2, "Open MPI")),
        (SLURM | TORCHRUN, Place(3, 4, 1, 2, "torchrun")),
        # a step that is said to have other tasks than there are ranks says nothing about nodes
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4"}, Place(2, 3, 0, 1, "Slurm")),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Place(1, 2, 0, 1, "torchrun")),
    ],
)
def test_place(environ: dict[str, str], place: Place) -> None:
    assert find_place(environ) == place


@pytest.mark.parametrize("rank", ["2", "-1"])
def test_a_rank_beyond_the_number_of_ranks(rank: str) -> None:
    with pytest.raises(ConfigError, match=f"RANK={rank} is not a rank of WORLD_SIZE=2"):
        find_place({"RANK": rank, "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("environ", "address", "port", "nodes"),
    [
        (TORCHRUN, "node1", 29400, ()),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "127.0.0.1", 29500, ()),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "5"}, "127.0.0.1", 5, ()),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}, "10.0.0.1", 29500, ()),
        (SLURM, "node1", None, ("node1", "node1", "node2")),
        (CYCLIC, "node1", None, ("node1", "node2", "node1", "node2")),
        (SLURM | {"MASTER_ADDR": "10.0.0.1"}, "10.0.0.1", None, ("node1", "node1", "node2")),
        (SLURM | {"MASTER_PORT": "7777"}, "node1", 7777, ("node1", "node1", "node2")),
        # a step of some nodes of a job: its own first one
        (SLURM | {"SLURM_JOB_NODELIST": "node[0-9]"}, "node1", None, ("node1", "node1", "node2")),
        # an order of ranks that is not understood: the nodes are not said, rather than wrong
        (CYCLIC | {"SLURM_DISTRIBUTION": "block"}, "node1", None, ()),
        (OPEN_MPI, "127.0.0.1", None, ()),
        (OPEN_MPI | {"MASTER_ADDR": "node1"}, "node1", None, ()),
        (OPEN_MPI | TWO_HOSTS | {"SLURM_JOB_NODELIST": "gpu[07-08]"}, "gpu07", None, ()),
        (MPICH, "", 0, ()),  # mpirun itself is asked
        (MPICH | {"MASTER_PORT": "7777"}, "127.0.0.1", 7777, ()),
        (MPICH | {"MASTER_ADDR": "node1"}, "node1", 29500, ()),
    ],
)
def test_point(
    environ: dict[str, str], address: str, port: int | None, nodes: tuple[str, ...]
) -> None:
    found = point(environ)
    assert (found.address, found.nodes) == (address, nodes)
    assert found.port in PORTS if port is None else found.port == port
    assert found.served == (environ is TORCHRUN)


def test_mpirun_says_how_to_ask_it() -> None:
    assert (point(MPICH).host, point(MPICH).descriptor) == ("node1", 11)
    assert point(MPICH | {"PMI_FD": "x"}).address == "127.0.0.1"  # all ranks are on one host


def test_all_tasks_of_a_step_on_one_node_meet_there() -> None:
    alone = {"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    alone |= {"SLURM_PROCID": "0", "SLURM_GTIDS": "0,1", "SLURM_STEP_NODELIST": "node2"}
    found = point(SLURM | alone)
    assert (found.address, found.nodes) == ("127.0.0.1", ("node2", "node2"))


def test_launches_have_ports_and_names_of_their_own() -> None:
    ranks = [point(SLURM | {"SLURM_PROCID": str(rank)}) for rank in range(3)]
    assert len({(found.port, found.launch) for found in ranks}) == 1
    others = [
        {"SLURM_JOB_ID": "3"},
        {"SLURM_STEP_ID": "1"},
        {"SLURM_RESTART_COUNT": "1"},
    ]
    found = [ranks[0], *(point(SLURM | other) for other in others)]
    assert len({each.launch for each in found}) == len({each.port for each in found}) == 4
    again = point(OPEN_MPI | {"PMIX_NAMESPACE": "prterun-node1-23024@1"})
    assert again.port != point(OPEN_MPI).port


@pytest.mark.parametrize(
    ("environ", "mend"),
    [
        (OPEN_MPI | TWO_HOSTS, "-x MASTER_ADDR=HOST"),
        (
            {k: v for k, v in MPICH.items() if k != "PMI_FD"} | {"MPI_LOCALNRANKS": "1"},
            "MASTER_ADDR=HOST",
        ),
        (SLURM | {"SLURM_STEP_NODELIST": "node[1"}, "MASTER_ADDR=HOST"),
    ],
)
def test_several_hosts_without_a_meeting_point(environ: dict[str, str], mend: str) -> None:
    with pytest.raises(ConfigError, match="does not say which of them has rank 0") as error:
        point(environ)
    assert f"start with {mend}" in error.value.fix


@pytest.mark.parametrize("port", ["0", "70000", "http", "-1", "1.5"])
def test_a_port_that_is_none(port: str) -> None:
    with pytest.raises(ConfigError, match=f"MASTER_PORT={port} is not a port"):
        point(TORCHRUN | {"MASTER_PORT": port})


NODES = [
    ("node1", "node1"),
    ("node[1-3,7],gpu01", "node1 node2 node3 node7 gpu01"),
    ("n[008-011]", "n008 n009 n010 n011"),
    ("n[9-11]", "n9 n10 n11"),
    ("r[1-2]n[01-02]", "r1n01 r1n02 r2n01 r2n02"),
    ("a[1,3],b-c.d", "a1 a3 b-c.d"),
    ("b2,b1", "b2 b1"),
]


@pytest.mark.parametrize(("text", "expected"), NODES)
def test_lists_of_nodes(text: str, expected: str) -> None:
    assert " ".join(expand_nodes(text)) == expected


@pytest.mark.processes
@pytest.mark.parametrize(("text", "expected"), NODES)
def test_lists_of_nodes_are_as_slurm_expands_them(text: str, expected: str) -> None:
    if shutil.which("scontrol") is None:
        pytest.skip("no Slurm")
    words = ["scontrol", "show", "hostnames", text]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    if done.returncode:
        pytest.skip(f"scontrol needs a configuration: {done.stderr.strip()}")
    assert done.stdout.split() == expected.split()


@pytest.mark.parametrize("text", ["", "n[1", "n1]", "n[a-b]", "n[]", "n 1"])
def test_no_list_of_nodes(text: str) -> None:
    with pytest.raises(ValueError):
        expand_nodes(text)


def test_counts_of_tasks() -> None:
    assert expand_counts("2(x3),1") == (2, 2, 2, 1)
    assert expand_counts("4") == (4,)
    for text in ("", "x", "2(x", "2(xy)"):
        with pytest.raises(ValueError):
            expand_counts(text)
