"""What is wrong with the input gets one clear line and the right exit code; nothing is lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from small_run import STEPS, command, final_tensors, flags, losses

from dtt import storage
from dtt.cli import main
from dtt.training.saved import seal

RUN = "runs/small"
NEWEST = f"{RUN}/checkpoints/step-{STEPS:08d}"
Dtt = Callable[..., tuple[int, str]]


@pytest.fixture
def dtt(folder: Path, capsys: pytest.CaptureFixture[str]) -> Dtt:
    """Run a command; return its exit code and what it wrote to stderr."""

    def run(*words: str) -> tuple[int, str]:
        code = main(list(words))
        return code, capsys.readouterr().err

    return run


def train(**changes: str | None) -> list[str]:
    return ["train", *flags({key.replace("__", "."): value for key, value in changes.items()})]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for locks and logs."""
    files = (path for path in folder.rglob("*") if path.is_file())
    kept = (path for path in files if path.suffix not in (".lock", ".log") and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def assert_one_line(outcome: tuple[int, str], code: int, *facts: str) -> None:
    """The exit code, one line on stderr that starts as every error does, and what it must say."""
    found, err = outcome
    assert found == code, err
    assert err.count("\n") == 1 and err.startswith("dtt ") and ": error: " in err, err
    assert "internal error" not in err
    missing = [fact for fact in facts if fact not in err]
    assert not missing, err


TEXTS = {
    "empty.txt": b"",
    "blank.txt": b" \n\n ",
    "short.txt": b"twenty characters...",
    "binary.txt": b"abc\0def" * 200,
    "latin.txt": b"x" * 700 + "caf\xe9 ".encode("latin-1") * 100,
    "tokenizer.json": b'{"not": "a tokenizer"}',
    "torn.json": b'{"model": {"type": "BPE", ',
    "extra.yaml": b"training:\n  max_step: 5\n",
    "torn.yaml": b"training: {max_steps: 5\n",
    "heads.yaml": b"model:\n  dim: 100\n  heads: 6\n",
    "twice.yaml": b"seed: 1\nseed: 2\n",
}


@pytest.mark.parametrize(
    ("words", "code", "facts"),
    [
        (["train", "-c", "gone.yaml"], 2, ["gone.yaml"]),
        (["train", "-c", "extra.yaml"], 2, ["extra.yaml:2: training.max_step: unknown key",
                                            "did you mean training.max_steps?"]),
        (["train", "-c", "torn.yaml"], 2, ["torn.yaml:"]),
        (["train", "-c", "twice.yaml"], 2, ["twice.yaml:2", "seed"]),
        (["train", "-c", "heads.yaml"], 2, ["dim (100) must be divisible by heads (6)"]),
        (["train", "--max-stepz", "5"], 2, ["--max-stepz, did you mean --max-steps?"]),
        (["train", "--max-steps"], 2, ["--max-steps: needs a value"]),
        (["train", "--max-steps", "many"], 2, ["--max-steps", "integer", "'many'"]),
        (train(data__source__path="gone.txt"), 3, ["gone.txt", "no such file"]),
        (train(data__source__path="empty.txt"), 3, ["empty.txt", "empty"]),
        (train(data__source__path="short.txt"), 3, ["the training text has 21 tokens",
                                                    "one window needs 33", "context 32 + 1"]),
        (train(data__source__path="binary.txt"), 3, ["binary.txt", "NUL byte at offset 3",
                                                     "binary file"]),
        (train(data__source__path="latin.txt"), 3, ["latin.txt", "byte 703 (0xe9) is not utf-8"]),
        (train(data__source__encoding="utf-9"), 2, ["unknown encoding 'utf-9'"]),
        (train(tokenizer__name="file", tokenizer__path="tokenizer.json"), 3, ["tokenizer.json"]),
        (train(tokenizer__name="file", tokenizer__path="torn.json"), 3, ["torn.json"]),
        (train(tokenizer__name="file", tokenizer__path="gone.json"), 3, ["gone.json"]),
        (train(model__vocab_size="5"), 2, ["model.vocab_size (5)", "the tokenizer's"]),
        (train(model__dim="30"), 2, ["dim (30) must be divisible by heads (4)"]),
        (train(schedule__warmup_steps="50"), 2, ["warmup_steps (50)", "longer than the run", "24"]),
        (train(training__max_steps=None, training__epochs="0.5", schedule__warmup_steps="50"), 2,
         ["50", "15"]),
        (train(parallel__world_size="3"), 2, ["batch_size (8)", "ranks (3)", "6 and 9"]),
        (train(training__micro_batch_size="3"), 2, ["batch_size (8)", "micro_batch_size (3)",
                                                    "ranks (1)", "6 and 9"]),
        (train(training__micro_batch_size="4", training__accumulation="3"), 2,
         ["batch_size (8)", "micro_batch_size (4)", "accumulation (3)", "it would be 2"]),
        (train(training__precision="fp16"), 2, ["fp16 on a CPU"]),
        pytest.param(train(training__device="cuda"), 2, ["cuda", "--device auto"],
                     marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")),
        (train(seed="-1"), 2, ["--seed"]),
        (train(optimizer__lr="nan"), 2, ["--optimizer.lr"]),
        (train(dir="text.txt"), 5, ["text.txt"]),
        (train(data__dir="text.txt"), 5, ["text.txt"]),
        (["evaluate", "gone"], 4, ["gone does not exist"]),
        (["evaluate"], 4, ["there is no run in ./runs"]),
        (["generate", ".", "--prompt", "a"], 4, [". is not a run"]),
        (["generate", "text.txt", "--prompt", "a"], 4, ["text.txt is a file, not a run folder"]),
        ([*train(), "--resume", "gone"], 4, ["gone does not exist"]),
    ],
)  # fmt: skip
def test_bad_input(dtt: Dtt, folder: Path, words: list[str], code: int, facts: list[str]) -> None:
    for name, data in TEXTS.items():
        (folder / name).write_bytes(data)
    assert_one_line(dtt(*words), code, *facts)
    assert not (folder / RUN).exists()


@pytest.mark.parametrize(
    ("ranks", "layout", "fact"),
    [
        ("2", "tensor=3", "tensor 3 does not divide the 2 ranks; use a multiple of 3 ranks"),
        ("1", "shard=2", "shard 2 does not divide 1 rank; use a multiple of 2 ranks"),
        ("3", "tensor=3", "model.heads (4) is not divisible by parallel.tensor (3)"),
        ("2", "tensor=2 model.kv_heads=1", "model.kv_heads (1) is not divisible by parallel.tens"),
        ("2", "pipeline=2 model.tied_head=true", "set model.tied_head to false, or parallel.pipe"),
        ("2", "expert=2", "parallel.expert is 2, and the model has no experts; set model.experts"),
        ("2", "context=2 model.context=30", "model.context (30) is not divisible by 2 x parallel"),
        ("2", "shard=-1 parallel.tensor=-1", "shard and tensor are both -1"),
    ],
)
def test_a_layout_that_cannot_be(
    dtt: Dtt, folder: Path, ranks: str, layout: str, fact: str
) -> None:
    changes = dict(pair.split("=") for pair in f"parallel.{layout}".split())
    assert_one_line(dtt("train", *flags(changes), "--world-size", ranks), 2, fact)
    assert [path.name for path in folder.iterdir()] == ["text.txt"]


@pytest.mark.processes
@pytest.mark.parametrize("ranks", ["2", "4"])
def test_bad_input_with_workers_is_said_once(folder: Path, ranks: str) -> None:
    """Ranks that fail alike, and ranks that fail because another one did, say nothing more."""
    common = {"parallel.world_size": ranks}
    for changes, code, fact in (
        ({"model.vocab_size": "5"}, 2, "model.vocab_size (5)"),
        ({"model.context": "9000"}, 3, "one window needs 9001"),
        ({"data.source.path": "gone.txt"}, 3, "gone.txt: no such file"),
        ({"optimizer.lr": "1e30", "schedule.warmup_steps": "0"}, 6, "the loss is nan"),
    ):
        done = command(folder, ["train", *flags(common | changes)])
        assert_one_line((done.code, done.err), code, fact)


@pytest.mark.parametrize("policy", ["replace", "skip"])
def test_bad_bytes_by_policy(dtt: Dtt, folder: Path, policy: str) -> None:
    (folder / "bad").mkdir()
    for index in range(40):
        text = f"story {index} of a cat and a dog\n".encode() * 8
        (folder / "bad" / f"{index}.txt").write_bytes(text + b"\xff" * (index == 0))
    changes = {"data.source.path": "bad", "data.source.on_bad": policy, "data.val_fraction": "0.3"}
    code, err = dtt("train", *flags(changes))
    assert code == 0, err
    done = "left out" if policy == "skip" else "repaired"
    assert err == f"dtt: warning: undecodable documents, {done}: 1\n"


@pytest.mark.parametrize(
    ("optimizer", "lr", "validate", "fact", "saved"),
    [
        ("muon", "1e30", "0", "step 2: the loss is nan", [1]),
        ("muon", "1e30", "1", "step 1: the validation loss is nan", []),
        ("adamw", "3e38", "0", "step 1: its update made weights not finite", []),
    ],
)
def test_a_loss_that_is_not_finite(
    dtt: Dtt, optimizer: str, lr: str, validate: str, fact: str, saved: list[int]
) -> None:
    words = train(
        optimizer__name=optimizer,
        optimizer__lr=lr,
        schedule__warmup_steps="0",
        checkpoint__every="1",
        evaluation__every=validate,
    )
    assert_one_line(dtt(*words), 6, fact, "lower optimizer.lr", "go on from the last checkpoint")
    assert list(losses(Path(RUN))) == [1]
    names = sorted(path.name for path in Path(RUN).glob("checkpoints/step-*"))
    assert names == [f"step-{step:08d}" for step in saved]
    if saved:
        assert all(tensor.isfinite().all() for tensor in final_tensors(Path(RUN)).values())


def failpoints(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DTT_ENABLE_FAILPOINTS", "1")
    monkeypatch.setenv("DTT_FAILPOINTS", text)
    storage.active_failpoints.cache_clear()


def test_an_error_lets_the_save_under_way_finish(dtt: Dtt, monkeypatch: pytest.MonkeyPatch) -> None:
    failpoints(monkeypatch, "checkpoint.manifest@step=1:sleep=0.3")
    words = train(optimizer__lr="1e30", schedule__warmup_steps="0", checkpoint__every="1")
    outcome = without_notice(dtt(*words))
    assert_one_line(outcome, 6, "step 2: the loss is nan")
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    assert [path.name for path in Path(RUN, "checkpoints").glob("step-*")] == ["step-00000001"]


def without_notice(outcome: tuple[int, str]) -> tuple[int, str]:
    """Leave out the line that says that failpoints are active."""
    lines = outcome[1].splitlines(keepends=True)
    return outcome[0], "".join(line for line in lines if "failpoints are active" not in line)


def test_a_full_disk_at_the_start(dtt: Dtt, monkeypatch: pytest.MonkeyPatch) -> None:
    failpoints(monkeypatch, "storage.write:enospc")
    outcome = without_notice(dtt(*train()))
    assert_one_line(outcome, 5, "No space left on device", "free some space")


def test_a_disk_that_is_full_for_a_while(dtt: Dtt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two saves fail; training goes on, and the run ends well."""
    failpoint = "storage.open@file=model.safetensors,hit={}:enospc"
    failpoints(monkeypatch, ";".join(failpoint.format(hit) for hit in (2, 3)))
    code, err = without_notice(dtt(*train(evaluation__every="0")))
    assert code == 0 and len(err.splitlines()) == 2
    for line, step in zip(err.splitlines(), (8, 12), strict=True):
        assert line.startswith(f"dtt: warning: the checkpoint of step {step} was not saved")
        assert "No space left on device" in line and "earlier checkpoints are intact" in line
    assert sorted(losses(Path(RUN))) == list(range(1, STEPS + 1))


def test_a_disk_that_stays_full(dtt: Dtt, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third failure in a row ends the run; what was saved before is whole."""
    failpoint = "storage.open@file=model.safetensors,hit={}:enospc"
    failpoints(monkeypatch, ";".join(failpoint.format(hit) for hit in range(2, 5)))
    code, err = without_notice(dtt(*train(evaluation__every="0")))
    *warnings, last = err.splitlines()
    assert code == 5 and len(warnings) == 2
    assert "3 saves failed in a row" in last and "No space left on device" in last
    names = [path.name for path in Path(RUN, "checkpoints").iterdir()]
    assert "step-00000004" in names and not [name for name in names if name.endswith(".tmp")]
    assert final_tensors(Path(RUN))


def test_a_final_save_that_fails(dtt: Dtt, monkeypatch: pytest.MonkeyPatch) -> None:
    failpoints(monkeypatch, f"checkpoint.commit@step={STEPS}:enospc")
    code, err = without_notice(dtt(*train(evaluation__every="0")))
    assert code == 5 and "dtt train: error:" in err
    assert f"the checkpoint of step {STEPS} was not saved" in err.splitlines()[-1]


class Canary:
    """Its unpickling leaves a file."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("canary",)


PICKLES: dict[str, Callable[[Path], object]] = {
    "model.pt": lambda path: torch.save({"model": Canary()}, path),
    "model.bin": lambda path: path.write_bytes(pickle.dumps(Canary())),
    "no-suffix": lambda path: path.write_bytes(pickle.dumps(Canary())),
}


@pytest.mark.parametrize("name", list(PICKLES))
@pytest.mark.parametrize("option", ["evaluate", "generate", "resume"])
def test_a_pickle_is_never_opened(dtt: Dtt, folder: Path, name: str, option: str) -> None:
    PICKLES[name](folder / name)
    words = {
        "evaluate": ["evaluate", name],
        "generate": ["generate", name, "--prompt", "a"],
        "resume": [*train(), "--resume", name],
    }[option]
    assert_one_line(dtt(*words), 4, name, "pickle", "dtt never opens one")
    assert not (folder / "canary").exists()


def test_a_pickle_in_place_of_tensors_is_never_opened(finished: Path, dtt: Dtt) -> None:
    """Also with a manifest that says that the file is as it should be."""
    file = Path(NEWEST, "model.safetensors")
    file.write_bytes(pickle.dumps(Canary()))
    rewrite_manifest(model=file.read_bytes())
    assert_one_line(dtt("evaluate", RUN, "--checkpoint", "last"), 4, "model.safetensors")
    assert not Path("canary").exists()


def rewrite_manifest(
    model: bytes | None = None, config: bytes | None = None, **changes: object
) -> None:
    """Change the newest checkpoint, and its manifest accordingly."""
    manifest = json.loads(Path(NEWEST, "manifest.json").read_bytes()) | changes
    for name, data in (("model.safetensors", model), ("config.yaml", config)):
        if data is not None:
            Path(NEWEST, name).write_bytes(data)
            digest = blake3(data).hexdigest()
            manifest["files"][name] = {"size": len(data), "blake3": digest}
    Path(NEWEST, "manifest.json").write_bytes(seal(manifest))


COMMANDS = {
    "evaluate": ["evaluate", RUN, "--checkpoint", "last"],
    "generate": ["generate", RUN, "--checkpoint", str(STEPS), "--prompt", "a"],
    "its folder": ["generate", NEWEST, "--prompt", "a"],
    "resume": [*train(name="other", training__max_steps="99"), "--resume", NEWEST],
    "resume run": [*train(name="other", training__max_steps="99"), "--resume", RUN],
}


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def huge_header(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])


@pytest.mark.parametrize("damage", [flipped, truncated, huge_header, Path.unlink])
@pytest.mark.parametrize("words", list(COMMANDS.values()), ids=list(COMMANDS))
def test_a_damaged_checkpoint_by_name(
    finished: Path, dtt: Dtt, damage: Callable[[Path], None], words: list[str]
) -> None:
    damage(Path(NEWEST, "model.safetensors"))
    before = tree(Path.cwd())
    assert_one_line(dtt(*words), 4, f"step-{STEPS:08d} is damaged", "model.safetensors")
    assert tree(Path.cwd()) == before


@pytest.mark.parametrize("words", list(COMMANDS.values()), ids=list(COMMANDS))
def test_another_version_of_the_format(finished: Path, dtt: Dtt, words: list[str]) -> None:
    rewrite_manifest(format=4, dtt="9.9")
    facts = ("format version 4", "written by dtt 9.9", "reads version 3", "use dtt 9.9")
    assert_one_line(dtt(*words), 4, *facts)


@pytest.mark.parametrize("words", list(COMMANDS.values()), ids=list(COMMANDS))
def test_an_unknown_key_in_a_checkpoints_config(finished: Path, dtt: Dtt, words: list[str]) -> None:
    text = Path(NEWEST, "config.yaml").read_text(encoding="utf-8")
    changed = text.replace("model:\n", "model:\n  adapters: 8\n")
    rewrite_manifest(config=changed.encode())
    line = 1 + changed.splitlines().index("  adapters: 8")
    facts = (f"config.yaml:{line}: model.adapters: unknown key", "made by dtt")
    assert_one_line(dtt(*words), 4, *facts)


def test_weights_of_another_model(finished: Path, dtt: Dtt) -> None:
    text = Path(NEWEST, "config.yaml").read_text(encoding="utf-8")
    rewrite_manifest(config=text.replace("  dim: 32\n", "  dim: 64\n").encode())
    facts = ("is of another model", "attention.out.weight", "(32, 32) there", "(64, 64) here")
    assert_one_line(dtt("evaluate", RUN, "--checkpoint", "last"), 4, *facts)


def test_evaluating_on_another_text(finished: Path, dtt: Dtt, folder: Path) -> None:
    (folder / "text.txt").write_text("0123456789 " * 400, encoding="utf-8")
    assert_one_line(dtt("evaluate", RUN), 3, "the text has changed since", "restore the text")


def test_the_runs_own_text_is_not_needed_to_generate(finished: Path, dtt: Dtt) -> None:
    shutil.rmtree("data")
    Path("text.txt").unlink()
    assert dtt("generate", RUN, "--prompt", "the", "--max-length", "5", "--seed", "1") == (0, "")


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("a long text " * 200, encoding="utf-8")
    for words in ([], ["--fresh"]):
        code = main(["train", "--data-path", "books", "--dir", ".", "--max-steps", "2", *words])
        assert_one_line((code, capsys.readouterr().err), 2, "books is not a run: it holds a.txt")
    assert (tmp_path / "books" / "a.txt").exists()


def test_pointer_files_name_checkpoints(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("abcdefgh " * 300, encoding="utf-8")
    small = ["--model", "tiny", "--model.context", "16", "--training.threads", "1"]
    train = ["train", "--data-path", "t.txt", *small, "--max-steps"]
    assert main([*train, "2"]) == 0
    assert main([*train, "4", "-n", "more", "--resume", "runs/t/checkpoints/last"]) == 0
    assert "starting from runs/t/checkpoints/step-00000002" in capsys.readouterr().out
    code = main([*train, "2", "-n", "other", "--resume", "runs/t/checkpoints/best"])
    assert_one_line((code, capsys.readouterr().err), 2, "is at step 2")
