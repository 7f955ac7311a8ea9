"""Runs that start from a folder of transformers: its weights bitwise, its settings, its tokens."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from starting import Command, config_of, flags, folder_of, losses_of
from stock_models import BASE, GPT2, LLAMA, MODELS, QWEN3

import dtt as dtt_package
from dtt.config.model import Experts, Learned
from dtt.config.schema import Config
from dtt.dist import Place, Runtime
from dtt.errors import ConfigError
from dtt.huggingface import origin
from dtt.huggingface.families import FAMILIES
from dtt.huggingface.folder import open_folder
from dtt.huggingface.origin import initial_weights, with_origin
from dtt.parallel.part import Part
from dtt.training.run import open_run

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("text_here")


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "dtt's default", "llama", "qwen3-moe", "mixtral"])
def test_a_run_begins_with_the_weights_bitwise_and_a_fresh_optimizer(name: str) -> None:
    folder, ours = folder_of(MODELS[name][1])
    config = config_of(folder)
    runtime = Runtime(Place(), torch.device("cpu"))
    with open_run(config, runtime, None, False) as run:
        found = run.stepper.model.state()
        assert found.keys() == ours.state_dict().keys()
        assert all(torch.equal(found[key], t) for key, t in ours.state_dict().items())
        assert run.state.step == 0 and not run.stepper.optimizer.named_state()
    assert run.config.tokenizer.name == "file"


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3-moe"])
def test_parts_are_read_as_ranks_have_them(name: str) -> None:
    model_type, settings = MODELS[name]
    folder, ours = folder_of(settings)
    shapes = {key: tuple(tensor.shape) for key, tensor in ours.state_dict().items()}
    model = config_of(folder).model
    weights = open_folder(folder, FAMILIES[model_type], model, shapes)
    draw = random.Random(0)
    for key, tensor in ours.state_dict().items():
        for _ in range(4):
            part = Part.all_of(shapes[key])
            for dim in range(tensor.ndim):
                # Rows of several ranges, as a rank has them of queries, keys and values.
                cuts = sorted(draw.sample(range(tensor.shape[dim] + 1), 4))
                ranges = ((cuts[0], cuts[1]), (cuts[2], cuts[3]))
                wanted = draw.choice([part.ranges[dim], ranges])
                part = Part(part.shape, (*part.ranges[:dim], wanted, *part.ranges[dim + 1 :]))
            assert torch.equal(weights.read(key, part), part.take(tensor)), (key, part)


def test_types_and_older_names_are_read() -> None:
    """bf16 as published, and GPT-2's names and tables as the first folders have them."""
    folder, ours = folder_of(GPT2)
    stored = load_file(folder / "model.safetensors")
    old = {key.removeprefix("transformer."): tensor.bfloat16() for key, tensor in stored.items()}
    old |= {f"h.{n}.attn.bias": torch.ones(1, 1, 96, 96).tril() for n in range(2)}
    old |= {f"h.{n}.attn.masked_bias": torch.tensor(-1e4) for n in range(2)}
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    shapes = {key: tuple(tensor.shape) for key, tensor in ours.state_dict().items()}
    weights = open_folder(folder, FAMILIES["gpt2"], config_of(folder).model, shapes)
    for key, tensor in weights.whole().items():
        assert torch.equal(tensor, ours.state_dict()[key].bfloat16().float())


@pytest.mark.processes
@pytest.mark.parametrize(
    "layout",
    [
        "tensor",
        pytest.param("shard", marks=pytest.mark.thorough),
        pytest.param("pipeline", marks=pytest.mark.thorough),
    ],
)
def test_ranks_that_divide_the_model_start_from_it_too(layout: str, dtt: Command) -> None:
    folder_of(LLAMA)
    words = [*flags(), "--init-from", "start", "--max-steps", "2"]
    assert dtt("train", *words, "-n", "one")[0] == 0
    done = subprocess.run(
        [
            *(sys.executable, "-m", "dtt", "train", *words),
            *("-n", "two", "--world-size", "2", f"--parallel.{layout}", "2"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path(dtt_package.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    assert "logits are those of transformers" in done.stdout
    one, two = losses_of("one"), losses_of("two")
    assert len(one) == 2 and two == pytest.approx(one, rel=1e-5)


# --- runs ----------------------------------------------------------------------------------------


def test_the_same_command_goes_on_exactly(dtt: Command) -> None:
    folder_of(LLAMA)
    words = [*flags(), "--init-from", "start"]
    assert dtt("train", *words, "-n", "whole", "--max-steps", "6")[0] == 0
    assert dtt("train", *words, "-n", "parts", "--max-steps", "3")[0] == 0
    code, out, err = dtt("train", *words, "-n", "parts", "--max-steps", "6")
    assert (code, err) == (0, "") and "continuing runs/parts from step 3" in out
    one, other = losses_of("whole"), losses_of("parts")
    assert len(one) == 6 and one == other
    assert dtt("evaluate", "runs/parts")[0] == 0


def test_a_folder_that_was_moved_is_no_other_run(dtt: Command) -> None:
    folder, _ = folder_of(LLAMA)
    words = ["train", *flags(), "-n", "parts"]
    assert dtt(*words, "--init-from", "start", "--max-steps", "2")[0] == 0
    folder.rename("elsewhere")
    code, out, err = dtt(*words, "--init-from", "elsewhere", "--max-steps", "3")
    assert (code, err) == (0, "") and "init_from: start -> elsewhere" in out
    folder_of(LLAMA | {"norm_eps": 1e-3}, "other")
    code, _, err = dtt(*words, "--init-from", "other", "--max-steps", "4")
    assert code == 4 and "model.norm_eps: 1e-06 -> 0.001" in err


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_a_run_with_a_checkpoint_needs_its_folder_no_more(
    left: str, dtt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin, "bring", lambda *name: pytest.fail("it was a folder"))
    folder, _ = folder_of(LLAMA, "my/start")  # as ORG/NAME
    words = ["train", *flags(), "--init-from", "my/start"]
    assert dtt(*words, "-n", "whole", "--max-steps", "6")[0] == 0
    assert dtt(*words, "-n", "parts", "--max-steps", "3")[0] == 0
    shutil.rmtree(folder)
    if left == "an empty folder":  # what a file system that is not mounted leaves
        folder.mkdir()
    code, out, err = dtt(*words, "-n", "parts", "--max-steps", "6")
    assert (code, err) == (0, "") and "continuing runs/parts from step 3" in out
    assert "init_from" not in out and "tokenizer" not in out
    assert losses_of("whole") == losses_of("parts")
    assert dtt("train", "-c", "runs/whole/config.yaml", "--max-steps", "7")[0] == 0
    shutil.rmtree("runs/parts/checkpoints")
    code, _, err = dtt(*words, "-n", "parts")
    assert code == 4 and "my/start" in err and err.count("\n") == 1


def test_what_never_was_there_starts_no_run(dtt: Command) -> None:
    folder, _ = folder_of(LLAMA)
    words = ["train", *flags(), "--init-from", "start", "--max-steps", "1"]
    assert dtt(*words, "-n", "old")[0] == 0
    shutil.rmtree(folder)
    for more in (["-n", "new"], ["-n", "old", "--fresh"]):
        code, _, err = dtt(*words, *more)
        assert code == 4 and "init_from: start does not exist" in err and err.count("\n") == 1
    assert Path("runs/old/checkpoints").exists() and not Path("runs/new").exists()


@pytest.mark.parametrize(
    "settings", [BASE, GPT2, LLAMA, QWEN3], ids=["base", "gpt2", "llama", "qwen3"]
)
def test_a_trained_run_writes_the_same_text_in_transformers(
    settings: dict[str, Any], dtt: Command
) -> None:
    folder_of(settings | {"init_std": 0.02})
    words = ["--init-from", "start", "-n", "tuned", "--max-steps", "20", "--lr", "3e-3"]
    assert dtt("train", *flags(), *words)[0] == 0
    code, out, err = dtt("export", "runs/tuned", "--checkpoint", "last")
    assert (code, err) == (0, "") and "transformers gives the tokens of dtt" in out
    prompt, count = "the cat ", 40
    code, ours, _ = dtt(
        *("generate", "runs/tuned", "--checkpoint", "last", "--prompt", prompt),
        *("--temperature", "0", "--max-length", str(count), "--precision", "fp32"),
    )
    folder = Path("exports/tuned-hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    made = theirs.generate(**inputs, max_new_tokens=count, do_sample=False)
    assert code == 0 and len(ours) > 20
    assert ours == tokenizer.decode(made[0], skip_special_tokens=True) + "\n"


# --- settings ------------------------------------------------------------------------------------


def test_settings_that_say_nothing_of_the_weights_are_the_users() -> None:
    folder, _ = folder_of(LLAMA | {"experts": Experts(number=4)})
    given = {"dropout": "0.1", "init_std": "0.5", "context": "32", "dim": "32", "heads": "4"}
    config = config_of(folder, **{f"model__{key}": value for key, value in given.items()})
    assert (config.model.dropout, config.model.init_std, config.model.context) == (0.1, 0.5, 32)
    assert config.model.kv_heads == 2 and config.model.experts is not None
    assert with_origin(config) == config  # also with every setting written out

    more = config_of(folder, model__experts__number="4", model__experts__balance="none")
    assert more.model.experts is not None and more.model.experts.balance == "none"


@pytest.mark.parametrize(
    ("settings", "given", "said"),
    [
        (LLAMA, {"dim": "64"}, "model.dim 64 (it has 32)"),
        (LLAMA, {"kv_heads": "4"}, "model.kv_heads 4 (it has 2)"),
        (LLAMA, {"context": "97"}, "model.context 97 (it has at most 96)"),
        (GPT2, {"context": "48"}, "model.context 48 (it has 96)"),
        (LLAMA, {"activation": "gelu"}, "model.activation gelu (it has swiglu)"),
        (LLAMA, {"tied_head": "true"}, "model.tied_head on (it has off)"),
        (LLAMA, {"positions.theta": "5.0"}, "model.positions.theta 5.0 (it has 10000.0)"),
        (LLAMA, {"preset": "gpt2"}, "model.layers 12 (it has 2)"),
        (LLAMA | {"window": 9}, {"window": "null"}, "model.window none (it has 9)"),
        (LLAMA, {"window": "5", "norm_eps": "0.1"}, "model.norm_eps 0.1 (it has 1e-06), "),
        (LLAMA, {"experts.number": "4"}, "model.experts on (it has none)"),
    ],
)
def test_settings_that_contradict_the_folder_are_refused_by_name(
    settings: dict[str, Any], given: dict[str, str], said: str
) -> None:
    folder, _ = folder_of(settings)
    with pytest.raises(ConfigError) as caught:
        config_of(folder, **{f"model__{key}": value for key, value in given.items()})
    assert said in caught.value.what and caught.value.what.startswith("start is another model: ")


def test_the_tokenizer_is_the_folders_unless_one_is_set(dtt: Command) -> None:
    folder, _ = folder_of()
    code, out, _ = dtt("train", "--init-from", "start", "--data-path", "text.txt", "--print-config")
    assert code == 0 and "path: start/tokenizer.json" in out and "end_of_text: <|endoftext|>" in out
    code, out, _ = dtt("train", "--init-from", "start", "--tokenizer", "byte", "--print-config")
    assert code == 0 and "name: byte" in out
    (folder / "tokenizer.json").unlink()
    code, _, err = dtt("train", "--init-from", "start", "--data-path", "text.txt")
    assert code == 2 and "start has no tokenizer.json; name one with --tokenizer" in err
    code, _, err = dtt("train", "--init-from", "start", "--tokenizer", "byte", *flags())
    assert code == 2 and "model.vocab_size (61) is smaller than the tokenizer's (257)" in err


def test_other_commands_take_the_folder_too(dtt: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of()
    for command in ("tokenize", "doctor"):
        words = (command, "--data-path", "text.txt", "--print-config", "--init-from")
        code, out, err = dtt(*words, "start")
        assert (code, err) == (0, "") and "path: start/tokenizer.json" in out
        assert "vocab_size: 61" in out
        code, _, err = dtt(*words, "absent")
        assert code == 4 and "init_from: absent does not exist" in err
    seen: list[Config] = []
    monkeypatch.setattr(
        "dtt.verification.report.verify_command", lambda config: seen.append(config) or 0
    )
    assert dtt("verify", "parallel", "--init-from", "start")[0] == 0
    assert seen[0].model.vocab_size == 61 and seen[0].tokenizer.name == "file"


def test_whether_logits_were_compared_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, ours = folder_of()
    config, notes = config_of(folder), []

    def said() -> str:
        runtime = Runtime(Place(), torch.device("cpu"))
        initial_weights(config, ours, runtime, notes.append)
        return notes[-1].removeprefix("starting from start (LlamaForCausalLM): ")

    needed = 8.0 * sum(tensor.numel() for tensor in ours.state_dict().values())
    same = r"its logits are those of transformers, to \de-\d\d of their range \(fp32, up to 96 "
    same += r"tokens\)"
    for memory in ((needed, 64e9), (0.0, 0.0)):  # enough, and unknown
        monkeypatch.setattr(origin, "memory", lambda memory=memory: memory)
        assert re.fullmatch(same, said())
    monkeypatch.setattr(origin, "memory", lambda: (needed - 1, 64e9))
    assert said() == "not compared with transformers, for want of 0.0 GB of memory"
    monkeypatch.setattr(origin, "find_spec", lambda name: None)
    assert said() == "not compared with transformers, which is not installed"


def test_learned_positions_and_rotary_ones_are_told_apart() -> None:
    folder, _ = folder_of(GPT2)
    assert isinstance(config_of(folder).model.positions, Learned)
