"""Folders that no run starts from: what is refused, and by which name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from starting import Command, edit, flags, folder_of, weights_changed
from stock_models import BASE, LLAMA

from dtt.config.model import Model, Rotary
from dtt.config.schema import Config
from dtt.errors import CheckpointError
from dtt.huggingface.origin import with_origin
from dtt.training.saved import open_checkpoint

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("text_here")
DAMAGED = "start/config.json is damaged: "
LAYERS = {"sliding_window": 9, "max_window_layers": "all"}


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
        # Values of another type than they should be.
        ({"rope_scaling": "linear"}, DAMAGED),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0}}, DAMAGED),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, DAMAGED),
        ({"model_type": []}, DAMAGED),
        ({"model_type": "qwen3", "use_sliding_window": True} | LAYERS, DAMAGED),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": 2} | LAYERS, DAMAGED),
    ],
)
def test_a_config_of_something_else_says_what(changes: dict[str, Any], said: str) -> None:
    folder, _ = folder_of()
    edit(folder, head_dim="gone", **changes)
    with pytest.raises(CheckpointError) as caught:
        with_origin(Config(name="a", init_from=str(folder)))
    assert said in str(caught.value) and "start/config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop(GATE), f"start lacks the tensor {GATE} [48, 32]"),
        (lambda w: w.update({GATE: w[GATE][:40].clone()}), f"{GATE} is [40, 32], and config.json"),
        (lambda w: w.update({GATE: w[GATE].to(torch.int8)}), f"{GATE} is I8: the weights are quan"),
        (
            lambda w: w[GATE][0].fill_(float("nan")),
            "start is damaged: blocks.1.mlp.gate.weight has values that are not finite",
        ),
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
        (
            lambda f: (f / "tokenizer.json").write_text('{"added_tokens": [1]}'),
            "start/tokenizer.json is damaged: ",
        ),
        (
            lambda f: (f / "tokenizer.json").write_text('{"model": "x"}'),
            "start/tokenizer.json is damaged: ",
        ),
        (
            lambda f: (f / "tokenizer_config.json").write_text('{"eos_token": [1]}'),
            "start/tokenizer_config.json is damaged: eos_token is [1]",
        ),
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
