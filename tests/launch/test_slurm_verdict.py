"""What becomes of a job, for every exit code and every way in which ranks end."""

from __future__ import annotations

import argparse
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtt.errors import ConfigError
from dtt.launch import slurm, slurm_attempt
from dtt.launch.attempts import attempts_of, record_of
from dtt.launch.job import Job
from dtt.launch.slurm_ready import ready_scripts
from dtt.launch.slurm_verdict import Attempt, Ended, decide, read_messages, worn
from dtt.metrics.progress import Progress

TWO = ["node1", "node2"]
READY = Path(slurm.__file__).parents[2] / "sbatch"


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """What the command ignores, the processes of later tests would ignore, too."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def attempt(begun: int, ended: int, *failed: str) -> Attempt:
    return Attempt("7", "7", begun, ended, failed)


@pytest.mark.parametrize(
    ("code", "action", "exit_code"),
    [
        (0, "done", 0),
        (75, "again", 75),
        (7, "again", 7),
        (137, "again", 137),  # SIGKILL: the kernel's, for memory; or a node that went
        (143, "again", 143),  # SIGTERM before dtt could handle it
        (138, "again", 138),  # SIGUSR1 before dtt could handle it
        (139, "again", 139),
        (1, "stop", 1),
        (2, "stop", 2),
        (3, "stop", 3),
        (4, "stop", 4),
        (5, "stop", 5),
        (6, "stop", 6),
        (8, "stop", 8),
        (70, "stop", 70),
        (76, "stop", 76),
        (130, "stop", 130),
        (141, "stop", 141),
    ],
)
def test_exit_codes_decide(code: int, action: str, exit_code: int) -> None:
    found = decide(Ended(code), [attempt(0, 8)], cancelled=False)
    assert (found.action, found.code) == (action, exit_code)


@pytest.mark.parametrize("code", [75, 7, 137])
def test_a_cancelled_job_does_not_come_back(code: int) -> None:
    assert decide(Ended(code), [attempt(0, 8)], cancelled=True).action == "stop"


def test_three_attempts_without_a_new_checkpoint_end_it() -> None:
    history = [attempt(0, 4)]
    for idle, (action, code) in enumerate([("again", 7), ("again", 7), ("stop", 76)], 1):
        history.append(attempt(4, 4))
        found = decide(Ended(7), history, cancelled=False)
        assert (found.action, found.code) == (action, code), idle
    assert "3 attempts in a row saved no new checkpoint (newest: step 4)" in found.why
    assert decide(Ended(7), [*history, attempt(4, 5)], cancelled=False).action == "again"
    assert decide(Ended(0), history, cancelled=False).action == "done"


def test_a_node_that_failed_twice_is_left_out() -> None:
    history = [attempt(0, 4, "node2"), attempt(4, 8), attempt(8, 12, "node2", "node3")]
    assert worn(history[:2]) == () and worn(history) == ("node2",)
    found = decide(Ended(137, ("node2",)), history, cancelled=False)
    assert (found.action, found.exclude) == ("again", ("node2",))


@pytest.mark.parametrize(
    ("said", "code", "expected"),
    [
        ("", 0, Ended(0)),
        ("", 1, Ended(1)),
        ("srun: error: node[1-2]: tasks 0-1: Exited with exit code 75", 75, Ended(75)),
        (  # rank 0 has lost rank 1, and srun returns the higher code
            "srun: error: node1: task 0: Exited with exit code 7\n"
            "srun: error: node2: task 1: Exited with exit code 3",
            7,
            Ended(3),
        ),
        (
            "srun: error: node1: task 0: Exited with exit code 7\n"
            "srun: error: node2: task 1: Killed",
            137,
            Ended(137, ("node2",)),
        ),
        (
            "srun: error: node2: task 1: Segmentation fault (core dumped)\n"
            "srun: error: node1: task 0: Exited with exit code 7",
            139,
            Ended(139, ("node2",)),
        ),
        ("srun: error: node1: tasks 0,2: Out Of Memory", 137, Ended(137, ("node1",))),
        ("srun: error: Node failure on node2", 1, Ended(137, ("node2",))),
        # Where each of several nodes failed, it was no node.
        ("srun: error: node[1-2]: tasks 0-1: User defined signal 1", 138, Ended(138)),
        (  # what srun itself ends afterwards says nothing of a node
            "srun: error: node2: task 1: Exited with exit code 7\n"
            "srun: First task exited 600s ago\n"
            "srun: error: node1: task 0: Killed",
            137,
            Ended(7),
        ),
        (  # rank 0 was stopped before the first step, and rank 1 has lost it
            "srun: error: node2: task 1: Exited with exit code 7\n"
            "srun: error: node1: task 0: Exited with exit code 75",
            75,
            Ended(75),
        ),
    ],
)
def test_the_cause_is_found_in_what_srun_says(said: str, code: int, expected: Ended) -> None:
    assert read_messages(said, code, TWO) == expected


def test_one_node_that_fails_is_named_though_it_is_all_there_is() -> None:
    assert read_messages("srun: error: gpu7: task 0: Killed", 137, ["gpu7"]).failed == ("gpu7",)


# --- the batch script's two questions, with commands that play Slurm ------------------------------


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """scontrol, sbatch and sinfo that write down how they were called; returns where."""
    calls, folder = tmp_path / "calls", tmp_path / "bin"
    folder.mkdir()
    calls.touch()
    answers = {
        "scontrol": 'case "$1 $4" in "show 12") echo "JobId=12 JobState=${STATE:-RUNNING} '
        "Reason=${REASON:-None} ExcNodeList=(null) Partition=main TimeLimit=01:00:00 NumNodes=2 "
        "CPUs/Task=4 NtasksPerN:B:S:C=8:0:*:* MinMemoryNode=64G Features=(null) "
        'TresPerNode=gres/gpu:h100:8,gres/shm";; esac\n'
        'if [ "$1" = requeue ]; then exit ${REQUEUE:-0}; fi',
        "sbatch": "cat >/dev/null; echo 13",
        "sinfo": "echo node1 idle; echo node2 ${NODE2:-idle}",
    }
    for name, answer in answers.items():
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {calls}\n{answer}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(slurm_attempt.signal, "signal", lambda *_: None)
    return calls


def ask(run: Path, event: str, code: int = 0, said: str | None = None, *rest: str) -> int:
    messages = run / "srun.err"
    run.mkdir(exist_ok=True)
    if said is not None:
        messages.write_text(said)
    words = ["--run", str(run), "--job", "12", "--chain", "12", "--nodes", "node[1-2]"]
    words += ["--messages", str(messages), "--code", str(code)]
    return slurm_attempt.main([event, *words, "--", *rest])


def asked(calls: Path, command: str) -> list[str]:
    lines = calls.read_text().splitlines()
    return [line for line in lines if line.startswith(command)]


def checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize(
    ("code", "requeues"), [(0, 0), (75, 1), (7, 1), (2, 0), (3, 0), (6, 0), (76, 0)]
)
def test_requeued_once_or_never(tmp_path: Path, commands: Path, code: int, requeues: int) -> None:
    run = tmp_path / "run"
    assert ask(run, "begin") == 0
    checkpoint(run, 8)
    assert ask(run, "end", code, "") == code
    assert asked(commands, "scontrol requeue") == ["scontrol requeue 12"] * requeues
    assert asked(commands, "scontrol update") == []


def test_what_is_cancelled_stays_so_but_the_wall_time_does_not(
    tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATE", "COMPLETING")
    for name, reason, requeues in (("a", "None", 0), ("b", "TimeLimit", 1)):
        monkeypatch.setenv("REASON", reason)
        ask(tmp_path / name, "begin")
        assert ask(tmp_path / name, "end", 75, "") == 75
        assert len(asked(commands, "scontrol requeue")) == requeues


def test_a_new_job_where_requeueing_is_off(
    tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUEUE", "1")
    run = tmp_path / "run"
    ask(run, "begin")
    checkpoint(run, 8)
    assert ask(run, "end", 75, "", "--max-steps", "9") == 75
    assert asked(commands, "sbatch") == [
        "sbatch --partition=main --time=01:00:00 --nodes=2 --cpus-per-task=4 --mem=64G "
        "--ntasks-per-node=8 --gres=gpu:h100:8,shm --parsable --dependency=afterany:12 /dev/stdin "
        "--max-steps 9"
    ]
    assert record_of(run).rows()[-1]["job"] == "13"


def test_three_attempts_of_nothing(
    tmp_path: Path, commands: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for expected in (7, 7, 76):
        assert ask(run, "begin") == 0
        assert ask(run, "end", 7, "") == expected
    assert "3 attempts in a row saved no new checkpoint (newest: none)" in capsys.readouterr().out
    assert len(asked(commands, "scontrol requeue")) == 2
    assert ask(run, "begin") == 76  # and not once more


def test_what_slurm_ended_is_written_down_by_the_next_attempt(
    tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it was said by srun, once the node is still down; then the node is left out."""
    run = tmp_path / "run"
    ask(run, "begin")
    checkpoint(run, 4)
    assert ask(run, "begin", said="srun: error: Node failure on node2") == 0
    checkpoint(run, 8)
    monkeypatch.setenv("NODE2", "down*")
    assert ask(run, "begin") == 7
    found = attempts_of(record_of(run).rows(), "12")
    assert [(a.begun, a.ended, a.failed) for a in found] == [
        (0, 4, ("node2",)),
        (4, 8, ("node2",)),
        (8, 8, ()),  # was not to have that node
    ]
    assert asked(commands, "scontrol update") == ["scontrol update JobId=12 ExcNodeList=node2"]
    # A Slurm that goes on with that node all the same is not asked for ever.
    assert [ask(run, "begin"), ask(run, "begin"), ask(run, "begin")] == [7, 7, 76]


def test_the_questions_load_nothing_heavy(tmp_path: Path) -> None:
    import subprocess

    script = "import sys, dtt.launch.slurm_attempt; print({'torch', 'pydantic'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


# --- scripts --------------------------------------------------------------------------------------


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    slurm.add_options(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("name", sorted(ready_scripts()))
def test_ready_scripts_are_what_dtt_writes(name: str) -> None:
    """`python -m dtt.launch.slurm_ready sbatch` writes them anew."""
    assert (READY / name).read_text(encoding="utf-8") == ready_scripts()[name]


def test_a_script_is_the_ready_one_but_for_its_words(tmp_path: Path) -> None:
    """What people begin with and what dtt submits do the same."""

    def body(text: str) -> str:
        return text[text.index('messages="') :]

    job = Job("deep one", tmp_path / "runs/a $b", ("-c", "it's.yaml"), 4, 8, 8, "/venv/bin/python")
    words = ("--time", "2-00", "--cpus-per-task", "4", "--setup", "module load cuda", "--exclusive")
    text = slurm.write(job, options(*words, "--after", "99"))
    assert body(text) == body(ready_scripts()["train.sh"])
    head = text[: text.index('messages="')]
    for line in (
        '#SBATCH --job-name="deep one"',
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --time=2-00",
        "#SBATCH --exclusive",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --dependency=afterok:99",
        "module load cuda",
        "arguments=(-c 'it'\"'\"'s.yaml')",
        f"run='{tmp_path}/runs/a $b'",
        "export SRUN_CPUS_PER_TASK=4",
    ):
        assert line in head.splitlines(), head


def test_a_chain_is_three_scripts_without_what_only_training_knows(tmp_path: Path) -> None:
    job = Job("r", tmp_path / "r", ("-c", "c.yaml", "--resume", "x", "--seed", "1"), 2)
    text = slurm.write(job, options("--chain"))
    parts = text.split("### ")[1:]
    assert [part.splitlines()[0] for part in parts] == ["download.sh", "tokenize.sh", "train.sh"]
    assert all("arguments=(-c c.yaml --seed 1)" in part for part in parts[:2])
    assert "arguments=(-c c.yaml --resume x --seed 1)" in parts[2]
    assert "--nodes=1" in parts[0] and "--nodes=2" in parts[1]


def test_fresh_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A job that is requeued would start over each time."""
    assert slurm_attempt.main(["folder", "-n", "r", "--fresh"]) == 2
    assert "--fresh in a Slurm job" in capsys.readouterr().err
    assert slurm_attempt.main(["folder", "-n", "r", "--checkpoint-dir", "out"]) == 0
    assert capsys.readouterr().out == "out/r\n"


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("1:30", 90), ("12:00:00", 43200), ("2-00", 172800), ("1-2:30", 95400)],
)
def test_times_as_slurm_reads_them(limit: str, seconds: int) -> None:
    assert slurm.seconds_of(limit) == seconds


def measured(step: float, save: float) -> Progress:
    return Progress(10, 100, 1e4, 90.0, step, save)


def test_when_the_signal_comes() -> None:
    assert slurm.signal_seconds(options(), None) == 300
    assert slurm.signal_seconds(options("--time", "10"), None) == 200
    assert slurm.signal_seconds(options("--signal-seconds", "45"), measured(1, 1)) == 45
    assert slurm.signal_seconds(options(), measured(0.5, 2)) == 120
    assert slurm.signal_seconds(options("--time", "2:00:00"), measured(10, 90)) == 460
    with pytest.raises(ConfigError, match="this run needs 460 s of it to save") as refused:
        slurm.signal_seconds(options("--time", "10"), measured(10, 90))
    assert "--time 16" in refused.value.fix
    with pytest.raises(ConfigError, match="not a time"):
        slurm.signal_seconds(options("--time", "soon"), None)


def test_without_slurm_submitting_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    job = Job("r", tmp_path / "r", ())
    with pytest.raises(ConfigError, match="no sbatch on this machine"):
        slurm.run(job, options(), slurm.write(job, options()))
