"""Runs that start from a folder of transformers: its weights bitwise, its settings, its tokens."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_models import BASE, GPT2, LLAMA, MODELS, QWEN3, make_run, quick_files

import dtt as dtt_package
from dtt.cli import main
from dtt.config.load import load_config
from dtt.config.model import Experts, Learned, Model, Rotary
from dtt.config.schema import Config
from dtt.dist import Place, Runtime
from dtt.errors import CheckpointError, ConfigError
from dtt.huggingface.export import open_export, write_export
from dtt.huggingface.families import FAMILIES
from dtt.huggingface.folder import open_folder
from dtt.huggingface.origin import with_origin
from dtt.metrics.loggers import read_metrics
from dtt.model.decoder import Decoder
from dtt.parallel.part import Part
from dtt.training.run import open_run
from dtt.training.saved import open_checkpoint

transformers = pytest.importorskip("transformers")
Command = Callable[..., tuple[int, str, str]]
TRAINING = {
    "data.source.name": "text",
    "data.source.path": "text.txt",
    "data.workers": "1",
    "training.batch_size": "4",
    "training.precision": "fp32",
    "training.device": "cpu",
    "training.threads": "1",
    "evaluation.max_tokens": "256",
    "sample.prompts": "[]",
    "optimizer.name": "adamw",
    "schedule.name": "constant",
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick_files(monkeypatch)
    draw = random.Random(0)
    words = ("the cat", "a dog", "saw", "it's big", "ran from", "and")
    text = "".join(draw.choice(words) + (".\n" if i % 9 == 8 else " ") for i in range(1200))
    Path("text.txt").write_text(text)


@pytest.fixture
def dtt(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: str) -> tuple[int, str, str]:
        code = main(list(words))
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


def folder_of(settings: dict[str, Any] = LLAMA, name: str = "start") -> tuple[Path, Decoder]:
    """Export a random model without proof; return the folder and the model."""
    run, ours = make_run(Path("made") / name, settings)
    folder = Path(name)
    write_export(open_export(run, "last", "hf", "fp32"), folder, verify=False)
    return folder, ours


def flags(**changes: str) -> list[str]:
    merged = TRAINING | {key.replace("__", "."): value for key, value in changes.items()}
    return [word for key, value in merged.items() for word in (f"--{key}", value)]


def config_of(folder: Path, **changes: str) -> Config:
    given = TRAINING | {"init_from": str(folder)}
    given |= {key.replace("__", "."): value for key, value in changes.items()}
    return with_origin(load_config((), {k: (f"--{k}", v) for k, v in given.items()}))


def losses_of(run: str) -> list[float]:
    rows = read_metrics(Path("runs") / run / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


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

    folder_of(LLAMA, "elsewhere")
    code, _, err = dtt(
        "train", *flags(), "--init-from", "elsewhere", "-n", "parts", "--max-steps", "6"
    )
    assert code == 4 and "init_from: start -> elsewhere" in err


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


# --- folders that cannot be started from ---------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value != "gone"}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_type": "bloom"},
            "model_type 'bloom' is no architecture that dtt has; it has gpt2",
        ),
        ({"model_type": "gone"}, "model_type None is no architecture"),
        ({"hidden_size": "gone", "vocab_size": "gone"}, "lacks vocab_size, hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which dtt's decoder does not have"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "the weights are quantized"),
        ({"hidden_size": 33}, "dim (33) must be divisible by heads (4)"),
        ({"num_hidden_layers": "two"}, "layers"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic', which dtt's decoder does not have",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5}},
            "attention_factor 1.5",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "linear scaling lacks its factor"),
    ],
)
def test_a_config_of_something_else_says_what(changes: dict[str, Any], said: str) -> None:
    folder, _ = folder_of()
    edit(folder, head_dim="gone", **changes)
    with pytest.raises(CheckpointError) as caught:
        with_origin(Config(name="a", init_from=str(folder)))
    assert said in str(caught.value) and "start/config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def weights_changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop(GATE), f"start lacks the tensor {GATE} [48, 32]"),
        (lambda w: w.update({GATE: w[GATE][:40].clone()}), f"{GATE} is [40, 32], and config.json"),
        (lambda w: w.update({GATE: w[GATE].to(torch.int8)}), f"{GATE} is I8: the weights are quan"),
        (lambda w: w.update(extra=torch.ones(1)), "has a tensor extra, which LlamaForCausalLM"),
        (
            lambda w: w.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
            "has a tensor model.layers.0.self_attn.q_norm.weight",
        ),
    ],
)
def test_weights_of_something_else_say_which_tensor(
    change: Callable[[dict[str, torch.Tensor]], Any], said: str, dtt: Command
) -> None:
    folder, _ = folder_of()
    weights_changed(folder, change)
    code, _, err = dtt("train", *flags(), "--init-from", "start", "-n", "a")
    assert code == 4 and said in err and err.count("\n") == 1
    assert not Path("runs/a").exists()


def test_a_head_or_a_bias_that_config_json_denies_is_refused(dtt: Command) -> None:
    folder_of(LLAMA | {"tied_head": True})
    weights_changed(
        Path("start"), lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 0})
    )
    command = ("train", *flags(max_steps="1"), "--init-from", "start", "-n", "a")
    assert dtt(*command)[0] == 0  # a copy of the embedding is no other head
    weights_changed(Path("start"), lambda w: w["lm_head.weight"].add_(1))
    code, _, err = dtt(*command, "--fresh")
    assert code == 4 and "lm_head.weight is not the embedding" in err
    folder_of(BASE, "plain")
    weights_changed(Path("plain"), lambda w: w["model.norm.bias"].add_(1))
    code, _, err = dtt("train", *flags(), "--init-from", "plain", "-n", "b")
    assert code == 4 and "model.norm.bias is not zero" in err


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "start lacks config.json: it is no model"),
        (lambda f: (f / "config.json").write_text("{"), "start/config.json is damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "it holds no object"),
        (lambda f: (f / "model.safetensors").unlink(), "start lacks model.safetensors"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "start has its weights as pickles only (pytorch_model.bin)",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 50), "start is damaged: model.sa"),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-100]
            ),
            "start is damaged: model.safetensors",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
            ),
            "start lacks model-00001-of-00002.safetensors, which",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../secret.safetensors"}}'
            ),
            "names files outside of the folder",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json is damaged"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "start/tokenizer.json"),
    ],
)
def test_a_damaged_folder_says_which_file(
    spoil: Callable[[Path], Any], said: str, dtt: Command
) -> None:
    folder, _ = folder_of()
    spoil(folder)
    code, _, err = dtt("train", *flags(), "--init-from", "start", "-n", "a")
    assert code in (3, 4) and said in err and err.count("\n") == 1
    assert not Path("runs/a").exists()


def test_code_in_the_folder_is_refused_unless_it_is_to_be_ignored(dtt: Command) -> None:
    folder, ours = folder_of()
    edit(folder, auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    (folder / "modeling.py").write_text("open('executed', 'w')\n")
    command = ("train", *flags(max_steps="1"), "--init-from", "start", "-n", "a")
    code, _, err = dtt(*command)
    assert code == 2 and "has code of its own (auto_map in config.json)" in err
    code, out, err = dtt(*command, "--init-ignore-code")
    assert (code, err) == (0, "") and "its logits are those of transformers" in out
    assert not Path("executed").exists()
    assert open_checkpoint(Path("runs/a"), "last", ("model",)).shapes("model").keys() == (
        ours.state_dict().keys()
    )


def test_other_logits_than_those_of_transformers_start_no_run(
    dtt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(LLAMA | {"positions": Rotary(theta=5e5)})
    whole = Model.model_validate

    def other(tree: Any, **options: Any) -> Model:
        return whole({**tree, "norm_eps": 1e-2}, **options)

    monkeypatch.setattr(Model, "model_validate", other)
    code, _, err = dtt("train", *flags(), "--init-from", "start", "-n", "a")
    assert code == 4 and "block 0, its attention" in err and not Path("runs/a").exists()


def test_learned_positions_and_rotary_ones_are_told_apart() -> None:
    folder, _ = folder_of(GPT2)
    assert isinstance(config_of(folder).model.positions, Learned)
