"""`dtt launch` as a user meets it: what it refuses, before anything is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dtt.cli import main
from dtt.commands.launch import plan

K8S = "k8s --image i --claim c"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no engine given; one of local, torchrun, slurm, mpi, ssh, k8s, skypilot"),
        ("torchrn", "unknown engine 'torchrn', did you mean torchrun?"),
        ("-c tiny", "unknown engine '-c'; one of local,"),
        ("local --nodes 0", "--nodes: should be an integer of at least 1, got '0'"),
        ("local --nodes x", "--nodes: should be an integer of at least 1, got 'x'"),
        ("local --nodes 2", "--nodes 2: `local` starts ranks on this machine; use torchrun"),
        ("mpi --nodes 1:2", "--nodes: only torchrun and ssh go on with fewer nodes, got '1:2'"),
        ("ssh --nodes 3:2", "--nodes: should be N or MIN:MAX, 0 < MIN <= MAX, got '3:2'"),
        ("local --gpus-per-node -1", "--gpus-per-node: should be an integer of at least 0"),
        ("local --ranks-per-node 0", "--ranks-per-node: should be an integer of at least 1"),
        ("local --gpus-per-node", "--gpus-per-node: needs a value"),
        ("local --gpu-per-node 2", "unknown option --gpu-per-node, did you mean --gpus-per-node?"),
        ("local --gpus_per_nod 2", "unknown option --gpus_per_nod, did you mean --gpus-per-node?"),
        ("local --max-step 2", "unknown option --max-step, did you mean --max-steps?"),
        ("local --max-steps -1", "--max-steps: should be greater than 0, got -1"),
        ("local -c nofile.yaml", "nofile.yaml: no such file"),
        ("local --gpus-per-node 2 --ranks-per-node 4", "a rank has one GPU; leave out --ranks-p"),
        ("local --ranks-per-node 4 --world-size 8", "--world-size 8 is a number of ranks on each"),
        ("local --gpus-per-node 2 --device cpu", "and training.device is cpu; give --device auto"),
        ("local --device cuda", "training.device is cuda, and no GPUs are asked for; give --gpus"),
        ("local --env x", "--env: should be NAME=VALUE, got 'x'"),
        ("torchrun --fresh", "--fresh: each restart of the job would remove what it has done"),
        ("torchrun --nodes 2", "2 nodes need a place to meet; give --rdzv-endpoint"),
        ("torchrun --nodes 2 --rdzv-endpoint :1", "--rdzv-endpoint: should be HOST:PORT, got ':1'"),
        ("torchrun --nodes 2 --rdzv-endpoint a:0", "--rdzv-endpoint: should be HOST:PORT, got"),
        ("local --ranks-per-node 3", "(8) is not divisible by accumulation (1) x ranks (3)"),
        ("ssh --hosts a,b --parallel.tensor 3", "tensor 3 does not divide the 2 ranks; use"),
        ("ssh --nodes 3:4 --hosts a,b,c,d", "(8) is not divisible by accumulation (1) x ranks (3"),
        ("ssh", "ssh: no hosts are given; give --hosts A,B,..."),
        ("ssh --hosts a,b --nodes 4", "--nodes 4, and --hosts names 2 (a, b); leave out --nodes"),
        ("ssh --hosts a,a", "--hosts: a is there twice"),
        ("ssh --hosts -oProxyCommand=x", "--hosts: needs a value"),
        ("ssh --hosts a,-oX", "--hosts: should be hosts with commas between them, got '-oX'"),
        ("ssh --hosts a;b", "--hosts: should be hosts with commas between them, got 'a;b'"),
        (
            "mpi --nodes 2",
            "mpi: no hosts are given for 2 nodes; give --hosts A,B,... or --hostfile FILE",
        ),
        ("mpi --hosts a --hostfile f", "--hosts and --hostfile name the same thing; give one"),
        ("mpi --flavour lam", "--flavour: invalid choice: 'lam'"),
        ("mpi --master-port 99999", "--master-port: should be an integer from 1024 to 65535"),
        ("k8s", "k8s: no container image is given; give --image IMAGE"),
        ("k8s --image i", "a pod's own disk is lost with it; give --claim NAME"),
        (f"{K8S} --memory big", "--memory: should be a size such as 64Gi, got 'big'"),
        (f"{K8S} --kind pod", "--kind: invalid choice: 'pod'"),
        ("skypilot --managed", "--managed: the disk of a spot machine is lost with it; give --b"),
        (
            "skypilot --gpus-per-node 8",
            "no kind is given for 8 GPUs a node; give --accelerator NAME",
        ),
        (
            "skypilot --accelerator H100",
            "--accelerator H100: no number is given; give --gpus-per-node G",
        ),
        ("logs --rank x", "--rank: should be an integer of at least 0, got 'x'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    line: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    # If a case were not refused, nothing may be started.
    monkeypatch.setattr("os.execvp", lambda *words: pytest.fail(f"started {words}"))
    monkeypatch.setattr("subprocess.run", lambda *words, **_: pytest.fail(f"started {words}"))
    assert main(["launch", *line.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("line", "program", "message"),
    [
        ("mpi", "mpirun", "mpirun is not in PATH; load its module or install"),
        ("ssh --hosts a", "ssh", "ssh is not in PATH; install an OpenSSH client"),
        (K8S, "kubectl", "kubectl is not in PATH; install it, or give --print > job.yaml"),
        ("skypilot", "sky", 'sky is not in PATH; pip install "skypilot[aws]"'),
    ],
)
def test_an_engine_that_is_absent_is_named(
    line: str,
    program: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", *line.split()]) == 2
    assert message in capsys.readouterr().err
    # What would be started can be shown all the same.
    assert main(["launch", *line.split(), "--print"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "nodes", "fewest", "ranks", "gpus"),
    [
        ("", 1, None, 1, 0),
        ("--gpus-per-node 4", 1, None, 4, 4),
        ("--ranks-per-node 4", 1, None, 4, 0),
        ("--world-size 4", 1, None, 4, 0),
        ("--gpus-per-node 4 --world-size 4", 1, None, 4, 4),
        ("--hosts a,b", 2, None, 1, 0),
        ("--hosts a,b --nodes 2:2", 2, None, 1, 0),
        ("--hosts a,b --nodes 1:2", 2, 1, 1, 0),
    ],
)
def test_the_size_of_a_job(line: str, nodes: int, fewest: int, ranks: int, gpus: int) -> None:
    _, _, job = plan("ssh", line.split())
    assert (job.nodes, job.fewest_nodes, job.ranks, job.gpus) == (nodes, fewest, ranks, gpus)


def test_the_ranks_get_what_is_not_the_launchers() -> None:
    line = "--nodes=2 -c tiny --print --rdzv_endpoint n1:29400 --lr 1e-3 --world_size=2 --debug"
    _, options, job = plan("torchrun", [*line.split(), "--env=A=b c"])
    assert job.arguments == ("-c", "tiny", "--lr", "1e-3", "--debug")
    assert options.print and job.environment == (("A", "b c"),)


@pytest.mark.parametrize(
    ("name", "label"),
    [("run", "run"), ("My $Run_7", "my-run-7"), ("ü", "run"), ("a" * 60, "a" * 40)],
)
def test_labels_are_what_dns_takes(name: str, label: str) -> None:
    assert plan("local", ["-n", name])[2].label == label


@pytest.mark.parametrize("line", ["--help", "local --help", "k8s -h", "ssh --help", "logs -h"])
def test_help_has_examples(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", *line.split()]) == 0
    out = capsys.readouterr().out
    assert "examples:\n  dtt launch" in out and max(map(len, out.splitlines())) <= 100


@pytest.mark.processes
def test_launching_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom dtt.cli import main\n"
        "assert main(['launch', 'ssh', '--hosts', 'a,b', '--print']) == 0\n"
        "assert not {'torch', 'numpy', 'tokenizers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=120)
