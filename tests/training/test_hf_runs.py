"""Runs whose model is one of transformers: stopped, continued, divided, used, taken elsewhere."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_run import STEPS, Done, assert_same_run, command, flags, losses, write_text

from dtt.cli import main
from dtt.config.load import load_config
from dtt.config.model import HfModel
from dtt.config.parallel import Parallel
from dtt.config.schema import Config
from dtt.dist import Place, Runtime
from dtt.errors import CheckpointError, ConfigError
from dtt.huggingface import proof
from dtt.huggingface.origin import initial_weights, with_origin
from dtt.model.hf.model import HfCausalModel
from dtt.parallel import plan
from dtt.parallel.part import Part
from dtt.training.build import build_model
from dtt.training.load import load_run
from dtt.training.refusals import require_plan
from dtt.verification import report
from dtt.verification.report import Difference

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.processes
RUN = Path("runs/small")
SIZES = "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4}"
GATED = "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 48}"
WITHOUT = {"model.layers": None, "model.dim": None, "model.heads": None}
GPT2 = WITHOUT | {"model.name": "hf", "model.architecture": "gpt2", "model.settings": SIZES}
LLAMA = GPT2 | {"model.architecture": "llama", "model.settings": GATED}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def train(folder: Path, changes: dict[str, str | None], **options: object) -> Done:
    done = command(folder, ["train", *flags(changes)], **options)  # type: ignore[arg-type]
    if "die" not in options:
        assert (done.code, done.err) == (0, "")
    return done


def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        folder.mkdir()
        write_text(folder / "text.txt")
    return folders


FSDP = LLAMA | {"parallel.shard": "2", "model.dropout": None}


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [(1, GPT2), pytest.param(2, FSDP, marks=pytest.mark.thorough)],
    ids=["gpt2, dropout", "llama, fsdp"],
)
def test_a_killed_run_goes_on_bitwise(
    tmp_path: Path, ranks: int, changes: dict[str, str | None]
) -> None:
    changes = changes | {"parallel.world_size": str(ranks), "parallel.restarts": "0"}
    whole, broken = two_folders(tmp_path)
    train(whole, changes)
    done = train(broken, changes, die=(ranks - 1, 15))
    assert done.code == (-signal.SIGKILL if ranks == 1 else 7)
    assert "continuing runs/small from step" in train(broken, changes).out
    assert sorted(losses(whole / RUN)) == list(range(1, STEPS + 1))
    assert_same_run(whole / RUN, broken / RUN)


def test_damaged_weights_are_not_taken_for_a_strange_model(folder: Path) -> None:
    """What is looked at before they are proven makes no sense, and the checkpoint before is."""
    changes = LLAMA | {"parallel.restarts": "0", "checkpoint.every": "4"}
    train(folder, changes, die=(0, 15))
    newest = max((folder / RUN / "checkpoints").glob("step-*"))
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2 :] = b"\xff" * (len(data) - len(data) // 2)  # NaN
    weights.write_bytes(data)
    done = command(folder, ["train", *flags(changes)])
    assert done.code == 0 and f"{newest.name} is damaged" in done.err
    assert "falling back" in done.err and "continuing runs/small from step 10" in done.out


def test_ranks_and_forwards_share_a_step_alike(tmp_path: Path) -> None:
    """With dropout, which is drawn for each forward: so forwards have the same samples."""
    one, two = two_folders(tmp_path)
    short = GPT2 | {"training.max_steps": "6", "training.micro_batch_size": "4"}
    train(one, short)
    train(two, short | {"parallel.world_size": "2"})
    ours, theirs = losses(one / RUN), losses(two / RUN)
    assert all(abs(theirs[step] / ours[step] - 1) < 1e-5 for step in ours) and len(ours) == 6


def described(architecture: str, settings: str = GATED) -> Config:
    """The complete configuration of such a model."""
    words = {"model.name": "hf", "model.architecture": architecture, "model.settings": settings}
    words["model.vocab_size"] = "64"
    return with_origin(load_config(overrides={k: (f"--{k}", v) for k, v in words.items()}))


def verified(
    monkeypatch: pytest.MonkeyPatch, architecture: str, settings: str = GATED, only: str = ""
) -> dict[str, Difference | str]:
    """What `dtt verify parallel` finds, with bounds that hold; of all cases, or of those named."""
    every = report.cases_for
    monkeypatch.setattr(
        report, "cases_for", lambda c: [x for x in every(c) if only in ("", x.name)]
    )
    found = dict(report.verify(described(architecture, settings)))
    for case, difference in found.items():
        assert isinstance(difference, str) or difference.within(case), (case.name, difference)
    return {case.name: difference for case, difference in found.items()}


ALWAYS = {"accumulation", "DDP", "DDP, accumulation", "FSDP2", "HSDP"}
DIVIDED = {"TP", "DDP x TP", "FSDP2 x TP"}


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "phi3"])
def test_layouts_train_what_one_process_trains(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = verified(monkeypatch, architecture, SIZES if architecture == "gpt2" else GATED)
    refused = {name for name, difference in found.items() if isinstance(difference, str)}
    assert refused == (DIVIDED if architecture == "gpt2" else set())  # it has no plan
    assert found.keys() >= ALWAYS | DIVIDED


def test_its_own_plan_divides_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Qwen3, whose norms of queries and keys are used by each rank for its own heads."""
    assert isinstance(verified(monkeypatch, "qwen3", only="TP")["TP"], Difference)


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ["gpt_neox", "starcoder2", "olmo2"])
def test_plans_of_other_kinds(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with digits, biases behind sums, outputs that are gathered."""
    assert isinstance(verified(monkeypatch, architecture, only="TP")["TP"], Difference)


@pytest.mark.thorough
def test_an_exchange_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "sum_backward", lambda x, group: x)
    monkeypatch.setattr(plan, "SAME", math.inf)
    with pytest.raises(AssertionError, match=r"layers.0.*weight"):
        verified(monkeypatch, "qwen3", only="TP")


@pytest.mark.parametrize(
    ("architecture", "more", "why"),
    [
        ("phi", "qk_layernorm: true", "does not say that ranks use model.layers.0.self_attn.q_lay"),
        ("cohere", "use_qk_norm: true", "does not run divided so (The size of tensor a"),
    ],
)
def test_a_plan_that_does_not_say_all_is_refused(
    architecture: str, more: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = GATED.replace("}", f", {more}}}")
    (found,) = set(verified(monkeypatch, architecture, given, only="DDP x TP").values())
    assert isinstance(found, str) and why in found


@pytest.mark.thorough
def test_a_run_of_divided_matrices_goes_on_alone(tmp_path: Path) -> None:
    one, two = two_folders(tmp_path)
    alone = LLAMA | {"model.dropout": None, "training.precision": "fp32"}
    train(one, alone)
    divided = {"parallel.world_size": "2", "parallel.tensor": "2", "parallel.restarts": "0"}
    assert train(two, alone | divided, die=(1, 15)).code == 7
    assert "continuing runs/small from step" in train(two, alone).out
    ours, theirs = losses(one / RUN), losses(two / RUN)
    assert set(ours) == set(theirs)
    assert all(abs(theirs[step] / ours[step] - 1) < 1e-4 for step in ours)


@pytest.mark.parametrize(
    ("architecture", "settings", "why"),
    [
        ("gpt2", SIZES, "gpt2 has no such plan"),
        ("llama", GATED.replace("heads: 4", "heads: 1"), r"attention_heads \(1\) is not divisible"),
        ("llama", GATED.replace("48", "47"), r"mlp.gate_proj \(47\) is not divisible by"),
    ],
)
def test_what_its_plan_cannot_divide(architecture: str, settings: str, why: str) -> None:
    config = described(architecture, settings)
    with pytest.raises(ConfigError, match=why):
        require_plan(config.model_copy(update={"parallel": Parallel(tensor=2)}), 2)


def test_all_that_a_plan_names_is_divided() -> None:
    model = described("gpt_neox").model
    assert isinstance(model, HfModel)
    names = {path.rpartition(".")[2] for path, _, _ in plan._planned(HfCausalModel(model), 2)}
    assert names == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


def test_a_style_that_dtt_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    strange = {"layers.*.self_attn.q_proj": "local_params"}
    monkeypatch.setattr(transformers.LlamaConfig, "base_model_tp_plan", strange)
    model = described("llama").model
    assert isinstance(model, HfModel)
    with pytest.raises(ConfigError, match=r"q_proj .* divided as 'local_params'"):
        plan.check_plan(model, 2)


def test_a_run_is_evaluated_continued_in_text_exported_and_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = two_folders(tmp_path)
    train(folder, LLAMA)
    monkeypatch.chdir(folder)
    assert main(["evaluate", str(RUN), "--json", "--checkpoint", "last"]) == 0
    measured = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    said = [row["val_loss"] for row in rows if "val_loss" in row][-1]
    assert measured["loss"] == pytest.approx(said, rel=0.05)  # of the first tokens of the split
    words = ["--prompt", "the cat", "--max-length", "20", "--temperature", "0"]
    assert main(["generate", str(RUN), "--checkpoint", "last", *words]) == 0
    text = capsys.readouterr().out
    assert text.startswith("the cat") and len(text) > 20

    assert main(["export", str(RUN), "-o", "taken", "--checkpoint", "last"]) == 0
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM, fp32" in shown and "transformers gives the tokens of dtt" in shown
    theirs = transformers.AutoModelForCausalLM.from_pretrained("taken").eval()
    loaded = load_run(RUN, checkpoint="last")
    names = dict(theirs.named_parameters())
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, names[name])
    tokenizer = transformers.AutoTokenizer.from_pretrained("taken")
    given = tokenizer("the cat", return_tensors="pt", return_token_type_ids=False)
    made = theirs.generate(**given, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(made[0], skip_special_tokens=True) == text.strip("\n")

    again = {"name": "again", "init_from": "taken", "model.name": "hf", "training.max_steps": "2"}
    without = {"model.architecture": None, "model.settings": None, "tokenizer.name": None}
    again |= {"model.context": None, "model.dropout": None, "optimizer.lr": "1e-9"}
    done = train(folder, LLAMA | without | again)
    assert "starting from taken, by its own names" in done.out
    assert losses(Path("runs/again"))[1] == pytest.approx(losses(RUN)[STEPS], rel=0.2)


def test_a_folder_describes_a_model_without_giving_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    transformers.GPT2Config(n_embd=48, n_layer=3, n_head=6, vocab_size=99).save_pretrained("their")
    words = {"model.name": "hf", "model.architecture": "their"}
    found = with_origin(
        load_config(overrides={key: (f"--{key}", value) for key, value in words.items()})
    ).model
    assert (found.architecture, found.layers, found.dim, found.heads) == ("gpt2", 3, 48, 6)
    assert found.vocab_size is None and found.settings["max_position_embeddings"] == 288


def test_a_run_goes_on_without_the_folder_that_described_it(tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    transformers.GPT2Config(**sizes).save_pretrained(tmp_path / "their")
    described = GPT2 | {"model.architecture": "their", "model.settings": None}
    train(tmp_path, described | {"training.max_steps": "2"})
    shutil.rmtree(tmp_path / "their")
    done = train(tmp_path, described | {"training.max_steps": "4"})
    assert "continuing runs/small from step 2" in done.out
    missing = command(tmp_path, ["train", *flags(described | {"name": "other"})])
    assert missing.code == 2 and "no causal language model 'their'" in missing.err


@pytest.mark.thorough
def test_the_engine_of_lightning_trains_it_alike(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    one, two = two_folders(tmp_path)
    short = GPT2 | {"training.max_steps": "6"}
    train(one, short)
    train(two, short | {"training.engine": "lightning"})
    ours, theirs = losses(one / RUN), losses(two / RUN)
    assert all(abs(theirs[step] / ours[step] - 1) < 1e-6 for step in ours) and len(ours) == 6


def test_weights_are_read_by_their_names_and_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a folder whose names lack what those of the model with a head begin with."""
    monkeypatch.chdir(tmp_path)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 48}
    theirs = transformers.GPT2Model(transformers.GPT2Config(**sizes))
    theirs.save_pretrained("base")
    words = {"model.name": "hf", "init_from": "base", "tokenizer.name": "char"}
    config = with_origin(
        load_config(overrides={key: (f"--{key}", value) for key, value in words.items()})
    )
    assert (config.model.context, config.model.vocab_size) == (48, 64)
    whole, runtime = build_model(config, torch.float32), Runtime(Place(), torch.device("cpu"))
    weights = initial_weights(config, whole, runtime, print)
    values = theirs.state_dict()
    for name, tensor in whole.state_dict().items():
        part = Part.all_of(tuple(tensor.shape))
        expected = values[name.removeprefix("transformer.")]
        assert torch.equal(weights.read(name, part), expected)
        if tensor.ndim == 2:
            rows = part.narrow(0, 1, 5)
            assert torch.equal(weights.read(name, rows), expected[1:5])
    del values["ln_f.bias"]
    save_file(values, "base/model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks the tensor transformer\.ln_f\.bias"):
        initial_weights(config, whole, runtime, print)


def test_a_folder_with_code_of_its_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    transformers.GPT2Config(auto_map={"AutoModelForCausalLM": "evil.Model"}).save_pretrained("e")
    (tmp_path / "e" / "evil.py").write_text("open('ran', 'w')")
    for flag in ("--model.architecture", "--init-from"):
        assert main(["train", "--model.name", "hf", flag, "e", "--print-config"]) == 2
        error = capsys.readouterr().err
        assert "code of its own" in error and error.count("\n") == 1
    assert not (tmp_path / "ran").exists()


def test_without_transformers_the_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = proof.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n, *a: None if n == "transformers" else find(n, *a)
    )
    assert main(["train", "--model.name", "hf", "--model.architecture", "gpt2"]) == 2
    assert capsys.readouterr().err == (
        "dtt train: error: model.name hf needs the Python package 'transformers'; "
        "pip install 'dtt[hf]'\n"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.name", "hf"], "model.name hf needs model.architecture, or init_from"),
        (["--training.fp8"], "training.fp8 is for dtt's own decoder"),
        (["--training.recompute", "selective"], "training.recompute selective is for dtt's own"),
        (["--parallel.context", "2", "--world-size", "2"], "parallel.context is 2, and divides"),
        (["--parallel.tensor", "2", "--world-size", "2"], "model.dropout does not go with"),
        (["--model.layers", "3"], "model hf has no layers (decoder has it)"),
    ],
)
def test_what_is_for_dtts_own_decoder_is_refused(
    folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = GPT2 | ({"model.architecture": None} if words[0] == "--model.name" else {})
    assert main(["train", *flags(given), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_model_that_cannot_keep_documents_apart_begins_no_run(folder: Path) -> None:
    sizes = SIZES.replace("}", ", word_embed_proj_dim: 32, ffn_dim: 32}")
    opt = GPT2 | {"model.architecture": "opt", "model.settings": sizes}
    apart = {"data.documents": "isolate", "data.packing": "best-fit"}
    done = command(folder, ["train", *flags(opt | apart)])
    assert done.code == 2 and not RUN.exists()
    assert done.err == (
        "dtt train: error: data.documents: this model cannot keep the documents of a window apart; "
        "set data.documents join, or data.packing contiguous\n"
    )
    assert command(folder, ["train", *flags(opt | {"training.max_steps": "1"})]).code == 0


def test_s2s_yaml_trains_as_it_stands(tmp_path: Path) -> None:
    """The sizes that it names stay; the test makes the rest small."""
    write_text(tmp_path / "text.txt")
    (tmp_path / "s2.yaml").write_text(
        'model: {name: "gpt2-small", hidden_size: 768, num_attention_heads: 12}\n'
    )
    small = {"model.layers": "1", "training.max_steps": "2", "training.batch_size": "2"}
    sizes = {"model.dim": None, "model.heads": None, "model.dropout": None}
    argv = ["train", "-c", "s2.yaml", *flags(small | sizes), "--model.vocab_size", "64"]
    done = command(tmp_path, argv)
    assert (done.code, done.err) == (0, "") and "1 layers x 768, 12 heads" in done.out
