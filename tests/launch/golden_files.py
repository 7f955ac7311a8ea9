"""What `dtt launch` makes of some command lines; `python tests/launch/golden_files.py` writes it.

Look at `git diff tests/launch/golden` after that: it is what users will run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import yaml

from dtt.commands.launch import plan
from dtt.launch.engines import ENGINES

FOLDER = Path(__file__).parent / "golden"
PYTHON, DIRECTORY = "/opt/dtt/bin/python", Path("/home/ann/my work")
PROMPT = """It's "$HOME", `date` \\ $(date) & $$"""
# On 8 sequences a step no more than 8 ranks could train.
JOBS = {
    "1-cpu": "-c tiny --ranks-per-node 2",
    "1x8": "-c tiny --gpus-per-node 8",
    "4x8": "-c gpt2-124m -b 512 --nodes 4 --gpus-per-node 8 --env NCCL_SOCKET_IFNAME=eth1",
}
HOSTS = "--hosts n1,ann@n2,n3,n4"
# The options of each engine, for one node, and for four.
OPTIONS: dict[str, tuple[str, str]] = {
    "local": ("", ""),
    "torchrun": ("", "--rdzv-endpoint n1:29500 --rdzv-id 7"),
    "mpi": ("", "--hosts n1,n2,n3,n4"),
    "mpi-openmpi": ("--flavour openmpi", "--flavour openmpi --hostfile hosts"),
    "mpi-mpich": ("--flavour mpich", "--flavour mpich --hostfile hosts"),
    "ssh": ("--hosts n1", HOSTS),
    "k8s": ("--image dtt:1 --claim work", "--image dtt:1 --claim work --memory 64Gi --cpus 96"),
    "k8s-pytorchjob": (
        "--image dtt:1 --claim work --kind pytorchjob",
        "--image dtt:1 --claim work --kind pytorchjob --namespace lab",
    ),
    "skypilot": ("--accelerator H100", "--accelerator H100 --managed --bucket runs"),
}


def cases() -> Iterator[tuple[str, str, list[str]]]:
    """Yield the golden file's name, the engine and the command line of each case."""
    for row, (one, four) in OPTIONS.items():
        engine = row.partition("-")[0]
        for size, words in JOBS.items():
            options = four if size == "4x8" else one
            if engine == "local" and size == "4x8":
                continue
            if engine == "skypilot" and size == "1-cpu":
                options = "--cpus 8"
            name = f"{row}-{size}{'.yaml' if engine in ('k8s', 'skypilot') else '.sh'}"
            yield name, engine, [*words.split(), *options.split()]
        if one == "" or engine == "ssh":
            odd = ["-n", "my $run", "--sample.prompts", PROMPT, "--env", f"ODD={PROMPT}"]
            yield f"{row}-odd.sh", engine, [*odd, *one.split()]
    yield "ssh-elastic.sh", "ssh", ["-c", "tiny", "--nodes", "2:4", *HOSTS.split()]
    meeting = ["--rdzv-endpoint", "n1"]
    yield "torchrun-elastic.sh", "torchrun", ["-c", "tiny", "--nodes", "1:4", *meeting]
    odd = ["-n", "my $run", "--sample.prompts", PROMPT, "--env", f"ODD={PROMPT}"]
    yield "k8s-odd.yaml", "k8s", [*odd, "--nodes", "2", *OPTIONS["k8s"][0].split()]


def text(engine: str, argv: list[str]) -> str:
    """Return what `--print` shows, with a fixed interpreter and working directory.

    Of the configuration two sections are enough here: a new setting changes no file.
    """
    module, options, job = plan(engine, argv)
    settings = yaml.safe_load(job.config)
    config = yaml.safe_dump({name: settings[name] for name in ("name", "sample")})
    fixed = replace(job, python=PYTHON, directory=DIRECTORY, config=config)
    written: str = module.write(fixed, options)
    return written


if __name__ == "__main__":
    for name, engine, argv in cases():
        assert engine in ENGINES
        (FOLDER / name).write_text(text(engine, argv), encoding="utf-8")
        print(name)
