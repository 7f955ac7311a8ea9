"""Whatever stops a run, the same command goes on, and the result is bitwise that of no stop."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import (
    STEPS,
    Done,
    assert_same_run,
    await_step,
    children,
    command,
    final_tensors,
    flags,
    losses,
    start,
    wait,
    write_text,
)
from torch import equal

from dtt.cli import main
from dtt.training import loop

pytestmark = pytest.mark.processes
Uninterrupted = Callable[[int], Path]
RUN = Path("runs/small")


def train(folder: Path, changes: dict[str, str | None] | None = None, **options: Any) -> Done:
    return command(folder, ["train", *flags(changes)], **options)


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run but for its lock and its log."""
    files = (path for path in run.rglob("*") if path.is_file())
    kept = [path for path in files if path.name not in ("lock", "train.log")]
    return {str(path.relative_to(run)): path.read_bytes() for path in kept}


def in_process(capsys: pytest.CaptureFixture[str], *words: str, **changes: str) -> Done:
    """Run `dtt train` here; the keys of `changes` have _ for the dot."""
    settings = {key.replace("__", "."): value for key, value in changes.items()}
    code = main(["train", *flags(settings), *words])
    streams = capsys.readouterr()
    return Done(code, streams.out, streams.err)


@pytest.mark.parametrize(("ranks", "seed"), [(1, 0), (1, 1), (2, 2), (2, 3)])
def test_killed_at_random_steps(
    folder: Path, uninterrupted: Uninterrupted, ranks: int, seed: int
) -> None:
    changes = {"parallel.world_size": str(ranks), "parallel.restarts": "0"}
    draw = random.Random(seed)
    for _ in range(3):
        done = train(folder, changes, die=(draw.randrange(ranks), draw.randint(5, 8)), slow=0.03)
        assert done.code == (-signal.SIGKILL if ranks == 1 else 7)
        if ranks == 2:
            assert "died by SIGKILL; the same command goes on" in done.err
            assert done.err.count("\n") == 1
    done = train(folder, changes)
    assert (done.code, done.err) == (0, "") and "continuing runs/small from step" in done.out
    assert sorted(losses(RUN)) == list(range(1, STEPS + 1))
    assert_same_run(RUN, uninterrupted(ranks))


@pytest.mark.parametrize(
    "failpoint",
    [
        "checkpoint.snapshot@step=8:kill9",
        "storage.write@file=optimizer.safetensors,hit=3:kill9",
        "checkpoint.commit@step=12:kill9",
        "checkpoint.committed@step=12:kill9",
        "checkpoint.pointers@step=10:kill9",
        "checkpoint.retained@step=12:kill9",
    ],
)
def test_killed_while_saving(folder: Path, uninterrupted: Uninterrupted, failpoint: str) -> None:
    environ = {"DTT_ENABLE_FAILPOINTS": "1", "DTT_FAILPOINTS": failpoint}
    assert train(folder, environ=environ).code == -signal.SIGKILL
    assert train(folder).code == 0
    assert_same_run(RUN, uninterrupted(1))
    names = {path.name for path in (RUN / "checkpoints").iterdir()}
    assert not [name for name in names if name.endswith((".tmp", ".old")) or ".trash" in name]


def test_killed_in_bf16_with_adamw_and_accumulation(folder: Path) -> None:
    changes: dict[str, str | None] = {
        "training.precision": "bf16",
        "optimizer.name": "adamw",
        "training.micro_batch_size": "4",
        "checkpoint.background": "false",
    }
    assert train(folder, changes | {"name": "whole"}).code == 0
    assert train(folder, changes, die=(0, 14)).code == -signal.SIGKILL
    assert train(folder, changes).code == 0
    assert_same_run(RUN, Path("runs/whole"))


MIXTURE = """data:
  packing: best-fit
  documents: isolate
  mixture:
    - {name: tales, weight: 2, source: {name: tales, stories: 40}}
    - {name: words, weight: 1, max_epochs: 0.3, source: {name: text, path: text.txt}}
"""


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_killed_with_a_mixture_of_packed_documents(folder: Path, ranks: str) -> None:
    (folder / "mixture.yaml").write_text(MIXTURE, encoding="utf-8")
    gone = {"data.source.name": None, "data.source.path": None}
    changes = gone | {"parallel.world_size": ranks, "parallel.restarts": "0"}
    words = ["train", "-c", "mixture.yaml", *flags(changes)]
    assert command(folder, [*words, "--name", "whole"]).code == 0
    for stop in (5, 9):
        assert command(folder, words, die=(0, stop), slow=0.03).code in (-signal.SIGKILL, 7)
    assert command(folder, words).code == 0
    assert_same_run(RUN, Path("runs/whole"))
    rows = [(RUN / "metrics.jsonl").read_text(), Path("runs/whole/metrics.jsonl").read_text()]
    seen = [[json.loads(line).get("samples") for line in text.splitlines()] for text in rows]
    assert seen[0] == seen[1]
    # The same text at another place is the same run.
    (folder / "moved").mkdir()
    (folder / "text.txt").rename(folder / "moved" / "text.txt")
    text = MIXTURE.replace("text.txt", "moved/text.txt")
    (folder / "mixture.yaml").write_text(text, encoding="utf-8")
    done = command(folder, words)
    assert done.code == 0 and "already complete" in done.out


def test_stopping_at_the_edge_of_an_epoch(folder: Path) -> None:
    """20 windows in batches of 8: epochs end within steps 3, 5 (at its end), 8, ..."""
    write_text(folder / "text.txt", characters=680)
    changes: dict[str, str | None] = {"checkpoint.every": "1", "training.max_steps": "12"}
    assert train(folder, changes | {"name": "whole"}).code == 0
    for stop in (2, 2, 2, 2, 4):  # steps of each part: it ends in the midst of the last one
        assert train(folder, changes, die=(0, stop)).code == -signal.SIGKILL
    assert train(folder, changes).code == 0
    assert_same_run(RUN, Path("runs/whole"))


@pytest.mark.parametrize(
    ("ranks", "number"),
    [  # Ctrl-C reaches every process of a terminal by itself: a launcher does not pass it on
        (1, signal.SIGTERM),
        (1, signal.SIGINT),
        (1, signal.SIGUSR1),
        (2, signal.SIGTERM),
        (2, signal.SIGUSR1),
    ],
)
def test_a_signal_saves_and_says_how_to_go_on(
    folder: Path, uninterrupted: Uninterrupted, ranks: int, number: signal.Signals
) -> None:
    changes: dict[str, str | None] = {"parallel.world_size": str(ranks), "logging.every": "1"}
    process = start(folder, ["train", *flags(changes)], slow=0.03)
    await_step(RUN, 6)
    os.kill(process.pid, number)
    done = wait(process, folder)
    assert (done.code, done.err) == (75, "")
    last = done.out.splitlines()[-1]
    assert last.endswith(f"of {STEPS}, saved; the same command goes on from there")
    stopped = int(last.split()[3])
    assert 6 <= stopped < STEPS and sorted(losses(RUN)) == list(range(1, stopped + 1))
    done = train(folder, changes)
    assert done.code == 0 and f"continuing runs/small from step {stopped}" in done.out
    assert_same_run(RUN, uninterrupted(ranks))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_before_the_first_step_is_a_preemption_too(folder: Path, ranks: int) -> None:
    changes: dict[str, str | None] = {"parallel.world_size": str(ranks)}
    process = start(folder, ["train", *flags(changes)], slow=30)  # seconds before the first step
    deadline = time.monotonic() + 60
    while not (RUN / "lock").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    done = wait(process, folder)
    assert (done.code, done.err) == (75, "")
    # Where the signal came just as the loop began, it took the one step that it was in.
    assert not (RUN / "metrics.jsonl").exists() or set(losses(RUN)) <= {1}


def test_a_signal_to_one_rank_stops_all(folder: Path, uninterrupted: Uninterrupted) -> None:
    changes: dict[str, str | None] = {"parallel.world_size": "2", "logging.every": "1"}
    process = start(folder, ["train", *flags(changes)], slow=0.03)
    await_step(RUN, 6)
    os.kill(children(process)[1], signal.SIGTERM)
    done = wait(process, folder)
    assert (done.code, done.err) == (75, "")
    assert train(folder, changes).code == 0
    assert_same_run(RUN, uninterrupted(2))


@pytest.mark.parametrize("step", [10, STEPS])
def test_a_signal_in_a_validation_is_acted_on_there(
    folder: Path,
    uninterrupted: Uninterrupted,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    """And whoever goes on does the validation that was cut short, after the last step too."""
    whole, measured = loop.evaluate, []

    def evaluate(*arguments: Any, **named: Any) -> Any:
        measured.append(1)
        if len(measured) == [10, 20, STEPS].index(step) + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments, **named)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    done = in_process(capsys)
    assert done.code == 75 and f"stopped at step {step} of {STEPS}, saved" in done.out
    assert f"step {step} validation" not in done.out
    done = in_process(capsys)
    assert done.code == 0 and f"step {step} validation" in done.out
    best = RUN / "checkpoints" / "best"
    assert best.read_text() == (uninterrupted(1) / "checkpoints" / "best").read_text()
    assert validations(RUN) == validations(uninterrupted(1))
    assert_same_run(RUN, uninterrupted(1))
    assert "is already complete" in in_process(capsys).out


def validations(run: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in rows if "val_loss" in row]


def test_a_second_run_in_the_same_folder_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start(folder, ["train", *flags({"logging.every": "1"})], slow=0.05)
    await_step(RUN, 2)
    begun = time.monotonic()
    done = in_process(capsys)
    assert time.monotonic() - begun < 2
    assert done.code == 8 and done.err.count("\n") == 1
    assert f"run folder runs/small is in use by process {process.pid}" in done.err
    os.kill(process.pid, signal.SIGTERM)
    assert wait(process, folder).code == 75


def test_a_finished_run_again_does_nothing(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    done = in_process(capsys)
    assert (done.code, done.err) == (0, "")
    assert f"runs/small is already complete: {STEPS} steps" in done.out
    assert contents(finished) == before


def test_more_steps_continue_a_finished_run(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = losses(finished)
    done = in_process(capsys, training__max_steps="30")
    assert done.code == 0 and "training.max_steps: 24 -> 30" in done.out
    after = losses(finished)
    assert list(after) == list(range(1, 31)) and before.items() <= after.items()


@pytest.mark.parametrize(
    ("setting", "value", "difference"),
    [
        ("seed", "1", "seed: 1337 -> 1"),
        ("model__dim", "64", "model.dim: 32 -> 64"),
        ("model__activation", "gelu", "model.activation: relu2 -> gelu"),
        ("tokenizer__name", "byte", "tokenizer.name: char -> byte"),
        ("data__val_fraction", "0.1", "data.val_fraction: 0.05 -> 0.1"),
        ("data__repeat", "2", "data.repeat: 1 -> 2"),
        ("training__batch_size", "16", "training.batch_size: 8 -> 16"),
        ("optimizer__name", "adamw", "optimizer.name: muon -> adamw"),
    ],
)
def test_another_run_of_that_name_is_refused_before_any_write(
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    value: str,
    difference: str,
) -> None:
    before = contents(finished)
    done = in_process(capsys, training__max_steps="30", **{setting: value})
    assert done.code == 4 and done.err.count("\n") == 1
    assert difference in done.err and "--name" in done.err and "--fresh" in done.err
    assert contents(finished) == before


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_another_text_under_the_same_name_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], tokenizer: str
) -> None:
    short = {"training__max_steps": "4", "tokenizer__name": tokenizer}
    assert in_process(capsys, **short).code == 0
    before = contents(RUN)
    write_text(folder / "text.txt", seed=1)
    done = in_process(capsys, **{**short, "training__max_steps": "8"})
    assert done.code == 4 and done.err.count("\n") == 1 and "text" in done.err
    assert contents(RUN) == before


def test_fresh_starts_over(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("loss.png", "notes-of-mine.txt"):
        (finished / name).write_text("x", encoding="utf-8")
    done = in_process(capsys, "--fresh", seed="1", training__max_steps="6")
    assert done.code == 0 and (finished / "notes-of-mine.txt").exists()
    assert (finished / "loss.png").read_bytes() != b"x"
    assert list(losses(finished)) == list(range(1, 7))
    names = {path.name for path in (finished / "checkpoints").iterdir() if path.is_dir()}
    assert names == {"step-00000004", "step-00000006"}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"data.source.path": "gone.txt"}, 3),
        ({"model.vocab_size": "5"}, 2),
        ({"model.context": "9000"}, 3),
        ({"schedule.warmup_steps": "50"}, 2),
    ],
)
def test_fresh_that_cannot_start_leaves_the_old_run(
    finished: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], code: int
) -> None:
    before = contents(finished)
    assert main(["train", *flags(changes), "--fresh"]) == code
    assert capsys.readouterr().err.count("\n") == 1
    assert contents(finished) == before


def test_resume_starts_from_another_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"name": "branch", "training__max_steps": "28"}
    done = in_process(capsys, "--resume", str(finished), **changes)
    assert done.code == 0
    assert f"starting from {finished}/checkpoints/step-00000024" in done.out
    assert list(losses(Path("runs/branch"))) == [25, 26, 27, 28]
    # The same command again continues the branch itself.
    done = in_process(capsys, "--resume", str(finished), **changes)
    assert done.code == 0 and "runs/branch is already complete: 28 steps" in done.out


def test_resume_from_a_checkpoint_by_its_folder(
    finished: Path, capsys: pytest.CaptureFixture[str], uninterrupted: Uninterrupted
) -> None:
    checkpoint = sorted((finished / "checkpoints").glob("step-*"))[0]
    step = int(checkpoint.name[5:])
    assert step < STEPS
    done = in_process(capsys, "--resume", str(checkpoint), name="branch")
    assert done.code == 0 and f"starting from {checkpoint}" in done.out
    whole = losses(uninterrupted(1))
    assert losses(Path("runs/branch")) == {s: x for s, x in whole.items() if s > step}
    ours, theirs = final_tensors(Path("runs/branch")), final_tensors(uninterrupted(1))
    assert all(equal(ours[name], theirs[name]) for name in theirs)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, halve, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
def test_a_damaged_newest_checkpoint_falls_back(
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    uninterrupted: Uninterrupted,
    damage: Callable[[Path], None],
    file: str,
) -> None:
    newest = finished / "checkpoints" / f"step-{STEPS:08d}"
    damage(newest / file)
    done = in_process(capsys)
    assert done.code == 0 and done.err.count("\n") == 1
    assert done.err.startswith("dtt: warning: checkpoint") and file in done.err
    assert "falling back to the checkpoint before it" in done.err
    assert_same_run(finished, uninterrupted(1))


def test_no_whole_checkpoint_is_an_error(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (finished / "checkpoints").glob("step-*"):
        flip(path / "model.safetensors")
    before = contents(finished)
    done = in_process(capsys)
    assert done.code == 4 and "no checkpoint in" in done.err and "--fresh" in done.err
    assert contents(finished) == before


def test_a_torn_metrics_file_is_mended(
    finished: Path, capsys: pytest.CaptureFixture[str], uninterrupted: Uninterrupted
) -> None:
    """A kill in the midst of a line: the checkpoint of step 20 is older than the lines."""
    shutil.rmtree(finished / "checkpoints" / f"step-{STEPS:08d}")
    metrics = finished / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-40])
    assert in_process(capsys).code == 0
    assert_same_run(finished, uninterrupted(1))
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row] == [10, 20, STEPS]
