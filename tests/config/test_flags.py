"""The command line of the configuration: every flag and alias, and what help says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtt.config.fields import leaves, sections
from dtt.config.flags import ALIASES, ConfigParser, docs_page
from dtt.config.schema import Config
from dtt.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ok.yaml").write_text(
        "name: char\nmodel: {dim: 192, heads: 6}\n"
        "training: {max_steps: 200, batch_size: 8}\noptimizer: {name: muon, lr: 0.01}\n",
        encoding="utf-8",
    )


def config(*words: str) -> Config:
    parser = ConfigParser("dtt train", "", ())
    return parser.config(parser.parse(words))


def get(found: Any, path: str) -> Any:
    for part in path.split("."):
        found = getattr(found, part)
    return found


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


GOOD: list[tuple[str, dict[str, Any]]] = [
    (
        "-c ok.yaml --model.dim 240 --training.max_steps 20",
        {"model.dim": 240, "training.max_steps": 20, "training.batch_size": 8},
    ),
    ("--model.dim 240 -c ok.yaml", {"model.dim": 240, "model.heads": 6}),
    (
        "--max-steps 20 --batch-size 4 --world-size 2 -d stdlib -n exp1",
        {
            "training.max_steps": 20,
            "training.batch_size": 4,
            "parallel.world_size": 2,
            "data.source.name": "stdlib",
            "name": "exp1",
        },
    ),
    ("-c ok.yaml --max-steps 7", {"training.max_steps": 7}),
    ("--training.max-steps=20", {"training.max_steps": 20}),
    ("--training.max_steps=20", {"training.max_steps": 20}),
    ("--max_steps 20", {"training.max_steps": 20}),
    ("--optimizer.lr 0.5", {"optimizer.lr": 0.5}),
    ("-c ok.yaml --optimizer.lr 0.5", {"optimizer.name": "muon", "optimizer.lr": 0.5}),
    ("-c ok.yaml --optimizer.name adamw", {"optimizer.name": "adamw", "optimizer.lr": 1e-3}),
    (
        "--optimizer.name sgd --optimizer.momentum 0.8",
        {"optimizer.name": "sgd", "optimizer.momentum": 0.8},
    ),
    (
        "--optimizer.momentum 0.8 --optimizer.name sgd",
        {"optimizer.name": "sgd", "optimizer.momentum": 0.8},
    ),
    ("--training.grad_clip null", {"training.grad_clip": None}),
    ("--optimizer.betas 0.8 0.9", {"optimizer.betas": (0.8, 0.9)}),
    ("--optimizer.betas 0.8,0.9", {"optimizer.betas": (0.8, 0.9)}),
    ("--optimizer.betas [0.8,0.9]", {"optimizer.betas": (0.8, 0.9)}),
    ("--model.tied_head true", {"model.tied_head": True}),
    ("--model.tied_head", {"model.tied_head": True}),
    ("--no-checkpoint.background", {"checkpoint.background": False}),
    ("-c ok.yaml -c tiny", {"model.dim": 64, "training.max_steps": 200, "name": "char"}),
    # The familiar names.
    ("--name n1", {"name": "n1"}),
    ("--dataset tales", {"data.source.name": "tales"}),
    ("--epochs 2.5", {"training.epochs": 2.5}),
    ("-e 2", {"training.epochs": 2.0}),
    ("--block-size 64", {"model.context": 64}),
    ("--n-ctx 64", {"model.context": 64}),
    ("--n_ctx 64", {"model.context": 64}),
    ("-b 4", {"training.batch_size": 4}),
    ("--micro-batch-size 4", {"training.micro_batch_size": 4}),
    ("--grad-acc-steps 4", {"training.accumulation": 4}),
    ("--learning-rate 3e-4", {"optimizer.lr": 3e-4}),
    ("--lr 3e-4", {"optimizer.lr": 3e-4}),
    ("--weight-decay 0", {"optimizer.weight_decay": 0.0}),
    ("--warmup-steps 0", {"schedule.warmup_steps": 0}),
    ("--checkpoint-dir out", {"dir": Path("out")}),
    ("-s 0", {"seed": 0}),
    ("--seed 0", {"seed": 0}),
    ("-v 600", {"tokenizer.vocab_size": 600}),
    ("--vocab-size 600", {"tokenizer.vocab_size": 600}),
    ("--precision bf16", {"training.precision": "bf16"}),
    ("--compile", {"training.compile": True}),
    ("--compile --no-compile", {"training.compile": False}),
    ("--device cpu", {"training.device": "cpu"}),
    ("--dropout 0", {"model.dropout": 0.0}),
    ("--checkpoint.every 5", {"checkpoint.every": 5}),
    (
        '--model.name hf --model.settings {"n_layer":2,"act":"relu"}',
        {"model.name": "hf", "model.settings": {"n_layer": 2, "act": "relu"}},
    ),
    ("--model.name gpt2-small", {"model.preset": "gpt2-small", "model.dim": 768}),
    ("--model gpt2-small", {"model.preset": "gpt2-small", "model.dim": 768}),
    ("--model gpt2 --block-size 8", {"model.context": 8, "model.dim": 768}),
    ("--tokenizer byte", {"tokenizer.name": "byte"}),
    (
        "--tokenizer t/tokenizer.json",
        {"tokenizer.name": "file", "tokenizer.path": Path("t/tokenizer.json")},
    ),
    ("--optimizer adam", {"optimizer.name": "adam"}),
    ("--schedule wsd", {"schedule.name": "wsd"}),
    ("--log-level warning", {"logging.level": "warning"}),
    ("--debug", {"logging.level": "debug"}),
    ("--debug --log-level error", {"logging.level": "error"}),
    # Corpora.
    (
        "--data-path a.txt --max-steps 20",
        {"data.source.path": ("a.txt",), "tokenizer.name": "char", "name": "a"},
    ),
    ("--data-path a.txt b.txt", {"data.source.path": ("a.txt", "b.txt")}),
    ("--data-path a.txt,b.txt", {"data.source.path": ("a.txt", "b.txt")}),
    ("--data-path a.txt -v 600", {"tokenizer.name": "bpe", "tokenizer.vocab_size": 600}),
    ("--tokenizer byte --data-path a.txt", {"tokenizer.name": "byte"}),
    ("-d a.txt", {"data.source.path": ("a.txt",), "tokenizer.name": "char"}),
    ("-d folder", {"data.source.path": ("folder",), "tokenizer.name": "bpe"}),
    ("-d src/*.py", {"data.source.path": ("src/*.py",), "tokenizer.name": "bpe"}),
]


@pytest.mark.parametrize(("line", "expected"), GOOD, ids=[line for line, _ in GOOD])
def test_a_command_line_means(line: str, expected: dict[str, Any]) -> None:
    found = config(*line.split())
    assert {path: get(found, path) for path in expected} == expected


def test_a_path_with_a_comma_that_exists_is_one() -> None:
    Path("a,b.txt").write_text("text", encoding="utf-8")
    assert get(config("--data-path", "a,b.txt"), "data.source.path") == ("a,b.txt",)


def test_a_dataset_file() -> None:
    Path("set.yaml").write_text("source: {name: text, path: x.txt}\nrepeat: 3", encoding="utf-8")
    found = config("-d", "set.yaml", "--data.repeat", "4")
    assert (get(found, "data.source.path"), found.data.repeat) == (("x.txt",), 4)


BAD = [
    (
        "--training.max-step 5",
        "unknown option --training.max-step, did you mean --training.max_steps?",
    ),
    ("--max-stepz 5", "unknown option --max-stepz, did you mean --max-steps?"),
    ("--layers 5", "unknown option --layers, did you mean --model.layers?"),
    ("--model.dim wide", "--model.dim: should be a valid integer, got 'wide'"),
    ("--model.dropout 1.5", "--model.dropout: should be less than 1, got 1.5"),
    ("--lr fast", "--lr: should be a valid number, got 'fast'"),
    ("-b 1.5", "-b: should be a valid integer, got 1.5"),
    ("--seed inf", "--seed: should be a finite number, got inf"),
    ("--model.dim", "--model.dim: needs a value"),
    ("--max_steps", "--max_steps: needs a value"),
    ("-e", "-e: needs a value"),
    ("-c", "-c: needs a value"),
    ("stray", "unexpected argument 'stray'"),
    ("-c nope.yaml", "nope.yaml: no such file or preset"),
    ("-c gtp2", "gtp2: no such file or preset, did you mean gpt2?"),
    ("--model gtp2", "--model: unknown preset 'gtp2', did you mean gpt2?"),
    ("-c ok.yaml --model.dim 100", "ok.yaml:2: model: dim (100) must be divisible by heads (6)"),
    ("--model.dim 102", "model: dim (102) must be divisible by heads (4)"),
    (
        "--max-steps 3 --warmup-steps 9",
        "--warmup-steps: schedule.warmup_steps (9) is longer than the run (training.max_steps 3)",
    ),
    (
        "--optimizer.momentum 0.8 --optimizer adamw",
        "--optimizer.momentum: optimizer adamw has no momentum (muon, sgd have it)",
    ),
    ("-v 300 --tokenizer char", "-v: tokenizer char has no vocab_size (bpe has it)"),
    ("--optimizer.betas [0.8", "--optimizer.betas: cannot read '[0.8' as a YAML list or mapping"),
    ("-d tales --data-path x", "-d and --data-path both name the corpus; give one"),
    ("--data-path x -d tales", "--data-path and -d both name the corpus; give one"),
    ("-d gone.yaml", "gone.yaml: no such file or directory"),
    ("--data.source.name text", "data.source.path: is required by data.source text"),
    ("--help modle", "--help: no section 'modle', did you mean model?"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_a_bad_command_line_gets_one_line(line: str, message: str) -> None:
    assert refused(*line.split()) == message


def test_every_setting_has_a_flag_and_documentation() -> None:
    parser = ConfigParser("dtt train", "", ())
    known = parser._option_string_actions
    for leaf in leaves().values():
        assert leaf.doc.strip(), f"{leaf.path} is not documented"
        assert leaf.flag.replace("_", "-") in known
    for path, doc in sections().items():
        assert doc.strip(), f"the section {path} is not documented"
    assert set(ALIASES) <= set(leaves())


def test_help_shows_aliases_and_sections(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ConfigParser("dtt train", "Train.", ("dtt train --lr 1e-3",))
    with pytest.raises(SystemExit) as stop:
        parser.parse(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "\x1b" not in text
    names = [name for group in ALIASES.values() for name in group]
    for word in [*names, "--data-path", "-c FILE", "--print-config", *Config.model_fields]:
        assert word in text
    assert text.rstrip().endswith("dtt train --lr 1e-3")


def test_help_of_a_section_shows_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ConfigParser("dtt train", "", ()).parse(["--help", "model"])
    text = " ".join(capsys.readouterr().out.split())
    for path in (path for path in leaves() if path.startswith("model.")):
        assert f"--{path}" in text and leaves()[path].default in text
    assert "--training" not in text


def test_the_page_of_all_settings() -> None:
    page = docs_page()
    for leaf in leaves().values():
        assert page.count(f"| `{leaf.path}` |") == 1
    for names in ALIASES.values():
        assert all(f"`{name}`" in page for name in names)
