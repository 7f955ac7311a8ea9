"""The command line as a user meets it: exit codes, a line for each error, nothing heavy loaded."""

from __future__ import annotations

import errno
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtt import cli
from dtt.cli import COMMANDS, main
from dtt.errors import DataError
from dtt.version import __version__

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dtt(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        code = main(list(words))
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `dtt train` end with an error."""
    module = types.ModuleType("failing")

    def run(argv: list[str]) -> int:
        raise error

    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "failing", module)
    monkeypatch.setitem(cli.COMMANDS, "train", ("", "failing"))


def stub(monkeypatch: pytest.MonkeyPatch, module: str, function: str) -> dict[str, Any]:
    """Replace what a command calls; the dictionary gets the arguments."""
    calls: dict[str, Any] = {}

    def record(*args: Any, **kwargs: Any) -> int:
        calls.update(kwargs, args=args)
        return 0

    fake = types.ModuleType(module)
    setattr(fake, function, record)
    monkeypatch.setitem(sys.modules, module, fake)
    return calls


@pytest.mark.processes
def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from dtt.cli import main; main(['--help']); "
        "print([m for m in ('torch', 'pydantic', 'yaml', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.processes
@pytest.mark.parametrize("module", ["dtt", "dtt.main"])
def test_python_dash_m(module: str) -> None:
    command = [sys.executable, "-m", module]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"dtt {__version__}\n"
    done = subprocess.run([*command, "train", "--max-stepz", "5"], capture_output=True, text=True)
    expected = "dtt train: error: unknown option --max-stepz, did you mean --max-steps?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


@pytest.mark.processes
def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m dtt config docs | head -c 5"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("# Con", "")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(dtt: Run, words: list[str]) -> None:
    code, out, err = dtt(*words)
    assert (code, err) == (0, "")
    assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_help_with_examples(dtt: Run, command: str) -> None:
    code, out, err = dtt(command, "--help")
    assert (code, err) == (0, "")
    examples = out.split("examples:\n")[1].splitlines()
    own = [line for line in examples if f"dtt {command}" in line]
    assert out.startswith(f"usage: dtt {command}") and 2 <= len(own) <= 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "dtt: error: unknown command 'trian', did you mean train?"),
        ("--trian", "dtt: error: unknown option '--trian', did you mean train?"),
        ("fly", "dtt: error: unknown command 'fly'; see dtt --help"),
        ("train --model.dim", "dtt train: error: --model.dim: needs a value"),
        ("train --resume", "dtt train: error: --resume: needs a value"),
        ("train --freshh", "dtt train: error: unknown option --freshh, did you mean --fresh?"),
        ("tokenize -c x.yaml", "dtt tokenize: error: x.yaml: no such file or preset"),
        ("evaluate r --stride 0", "--stride: should be an integer of at least 1, got '0'"),
        ("evaluate r --checkpoint first", "--checkpoint: should be best, last or a step"),
        ("evaluate r s", "dtt evaluate: error: unexpected argument 's'"),
        ("generate r --temperature -1", "--temperature: should be a number of at least 0"),
        ("generate r --temperature nan", "--temperature: should be a number of at least 0"),
        ("generate r --top-p 1.5", "--top-p: should be a number from 0 to 1, got '1.5'"),
        ("generate r --top-p 0 --prompt a", "--top-p: should be more than 0, got 0"),
        ("generate r --top-k 0", "--top-k: should be an integer of at least 1, got '0'"),
        ("generate r", "no prompt; give --prompt TEXT, --prompt-file FILE or --interactive"),
        ("generate r --prompt-file gone", "--prompt-file: gone: no such file or directory"),
        ("generate r --interactive --prompt a", "--interactive: asks for prompts"),
        ("config", "dtt config: error: the following arguments are required"),
        ("config nonsense", "invalid choice: 'nonsense'"),
    ],
)  # fmt: skip
def test_usage_errors_are_one_line_and_exit_2(dtt: Run, line: str, message: str) -> None:
    code, out, err = dtt(*line.split())
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1 and err.startswith("dtt")


def test_every_wrong_setting_gets_its_line(dtt: Run) -> None:
    code, _, err = dtt("train", "--model.dim", "x", "--seed", "-1")
    assert code == 2
    assert [line.split(": ")[:3] for line in err.splitlines()] == [
        ["dtt train", "error", "--seed"],
        ["dtt train", "error", "--model.dim"],
    ]


def test_print_config_reads_back_equal(dtt: Run) -> None:
    _, out, _ = dtt("train", "--model", "gpt2", "--lr", "3e-4", "--print-config")
    Path("back.yaml").write_text(out, encoding="utf-8")
    assert dtt("train", "-c", "back.yaml", "--print-config") == (0, out, "")


def test_config_command(dtt: Run) -> None:
    assert "nanogpt-char" in dtt("config", "presets")[1]
    assert dtt("config", "schema", "-o", "s.json") == (0, "", "")
    assert Path("s.json").read_text(encoding="utf-8") == dtt("config", "schema")[1]
    code, _, err = dtt("config", "schema", "-o", "gone/s.json")
    assert code == 5 and "gone/s.json: no such file or directory" in err


def test_train_calls_the_launcher(dtt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stub(monkeypatch, "dtt.launch.training", "launch_training")
    assert dtt("train", "--max-steps", "3", "--resume", "runs/a", "--fresh")[0] == 0
    assert (calls["resume"], calls["fresh"]) == (Path("runs/a"), True)
    assert calls["args"][0].training.max_steps == 3


def test_tokenize_and_download_call_the_data_layer(
    dtt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stub(monkeypatch, "dtt.data.preparation.tokenizing", "prepare_command")
    assert dtt("tokenize", "-d", "stdlib", "--force")[0] == 0
    assert calls["force"] is True and calls["args"][0].data.source.name == "stdlib"
    calls = stub(monkeypatch, "dtt.data.remote.download", "download_command")
    assert dtt("download", "-d", "tales", "-o", "t.txt")[0] == 0
    assert calls["output"] == Path("t.txt")


def test_evaluate_and_generate_pass_their_options(
    dtt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stub(monkeypatch, "dtt.evaluation", "evaluate_command")
    assert dtt("evaluate", "--stride", "5", "--split", "train", "--json")[0] == 0
    assert calls == {
        "args": (),
        "run": None,
        "checkpoint": "best",
        "split": "train",
        "stride": 5,
        "batch_size": None,
        "max_tokens": None,
        "device": "auto",
        "precision": "auto",
        "json": True,
    }
    calls = stub(monkeypatch, "dtt.generation", "generate_command")
    Path("p.txt").write_text("from a file", encoding="utf-8")
    line = ["generate", "r", "--prompt", "a", "--prompt", "b", "--prompt-file", "p.txt"]
    assert dtt(*line, "--temperature", "0", "--seed", "0", "--top_k", "3")[0] == 0
    assert (calls["run"], calls["prompts"]) == (Path("r"), ["a", "b", "from a file"])
    assert (calls["temperature"], calls["seed"], calls["top_k"]) == (0, 0, 3)
    assert (calls["max_length"], calls["num_samples"], calls["output"]) == (200, 1, None)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("x.txt: empty", "give another"), 3, "error: x.txt: empty; give another"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 70, "error: out of memory: no details; lower --micro-batch-size"),
        (OSError(errno.ENOSPC, "No space left", "f.bin"), 5, "error: f.bin: no space left; free"),
        (PermissionError(errno.EACCES, "Denied", "f"), 5, "error: f: denied; change its perm"),
        (ModuleNotFoundError("no", name="torch"), 2, "error: the Python package 'torch' is"),
        (TypeError("a\nb"), 70, "error: internal error: TypeError: a b (cli.py:"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_line(
    dtt: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    failing(monkeypatch, error)
    found, out, err = dtt("train")
    assert (found, out) == (code, "")
    assert err.startswith(f"dtt train: {message}") and err.count("\n") == 1


def test_debug_shows_the_traceback(dtt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, TypeError("wrong"))
    for words in (["--debug", "train"], ["train", "--debug"]):
        code, _, err = dtt(*words)
        assert code == 70 and "Traceback" in err
        assert err.splitlines()[-1].startswith("dtt train: error: internal error: TypeError: wrong")
