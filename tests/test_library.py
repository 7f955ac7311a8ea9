"""dtt in a notebook: the public names, and a run without the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dtt
from dtt import Config, generate, load_run, train
from dtt.errors import CheckpointError, ConfigError, DataError
from dtt.training.launch import Trained


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    return Config.model_validate(
        {
            "name": "small",
            "model": {"layers": 1, "dim": 16, "heads": 2, "context": 16},
            "tokenizer": {"name": "char"},
            "data": {"source": {"name": "tales", "stories": 60}, "workers": 1},
            "training": {"max_steps": 4, "batch_size": 4, "threads": 1, "precision": "fp32"},
            "evaluation": {"max_tokens": 64},
            "sample": {"prompts": []},
        }
    )


def test_the_public_names() -> None:
    assert dtt.__all__ == ["Config", "__version__", "generate", "load_run", "train"]
    for name in dtt.__all__:
        assert getattr(dtt, name) is not None
    with pytest.raises(AttributeError, match="module 'dtt' has no attribute 'trian'"):
        dtt.trian  # noqa: B018


@pytest.mark.processes
def test_importing_dtt_imports_no_torch() -> None:
    code = "import sys, dtt; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


@pytest.mark.processes
@pytest.mark.parametrize("before", ["", "import dtt.training.launch, dtt.generation; "])
def test_the_public_functions_in_a_fresh_interpreter(before: str) -> None:
    """`train` and `generate` are names of modules too, whatever was imported first."""
    code = (
        f"{before}from dtt import Config, train, load_run, generate\n"
        "for call in (lambda: generate('gone', 'a'), lambda: train(Config(), nonsense=1)):\n"
        "    try: call()\n"
        "    except Exception as error: print(type(error).__name__, 'nonsense' in str(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["CheckpointError", "False", "TypeError", "True"]


def test_train_load_and_generate(config: Config) -> None:
    trained = train(config)
    assert trained == Trained(Path("runs/small"), 4, True, trained.best_loss)
    assert trained.best_loss is not None and 0 < trained.best_loss < 10
    run = load_run(trained.folder, checkpoint="last", precision="fp32")
    assert (run.step, run.folder) == (4, trained.folder) and not run.model.training
    assert run.config.model.vocab_size == run.tokenizer.vocab_size
    tokens = [int(token) for token in run.tokenizer.encode("Once upon")]
    logits = run.model(torch.tensor([tokens]))
    assert logits.shape == (1, 9, run.tokenizer.vocab_size)
    table = run.metrics
    assert table["step"] == [1, 2, 3, 4] and {len(column) for column in table.values()} == {4}
    assert table["val_loss"] == [None, None, None, trained.best_loss]
    (run.folder / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is missing"):
        run.metrics  # noqa: B018

    texts = generate(run, ["Once", "The "], max_length=8, seed=3)
    assert [text[:4] for text in texts] == ["Once", "The "]
    assert texts == generate(run, ["Once", "The "], max_length=8, seed=3)
    assert generate(trained.folder, "Once", max_length=8)[0].startswith("Once")


def test_a_model_can_be_used_though_its_optimizer_is_damaged(config: Config) -> None:
    folder = train(config).folder
    for saved in (folder / "checkpoints").glob("step-*"):
        (saved / "optimizer.safetensors").write_bytes(b"damaged")
    assert generate(folder, "Once", max_length=8)[0].startswith("Once")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        train(config.model_copy(update={"training": config.training}))


def test_train_again_continues(config: Config) -> None:
    train(config)
    longer = config.model_copy(
        update={"training": config.training.model_copy(update={"max_steps": 6})}
    )
    assert train(longer).step == 6
    assert train(longer, fresh=True).step == 6
    with pytest.raises(ConfigError, match="runs/small is at step 6"):
        train(longer.model_copy(update={"name": "branch"}), resume="runs/small")
    steps = longer.training.model_copy(update={"max_steps": 8})
    branch = longer.model_copy(update={"name": "branch", "training": steps})
    assert train(branch, resume="runs/small").step == 8


def test_a_config_without_a_name_gets_one(config: Config) -> None:
    trained = train(config.model_copy(update={"name": None}))
    assert trained.folder == Path("runs/tales")


def test_errors_are_those_of_dtt(config: Config) -> None:
    with pytest.raises(CheckpointError, match="gone does not exist"):
        load_run("gone")
    with pytest.raises(CheckpointError, match=r"no run in \./runs"):
        load_run()
    with pytest.raises(ConfigError, match="is not divisible"):
        training = config.training.model_copy(update={"micro_batch_size": 3})
        train(config.model_copy(update={"training": training}))
    with pytest.raises(DataError, match="one window needs 100001"):
        model = config.model.model_copy(update={"context": 100_000})
        train(config.model_copy(update={"model": model}))
