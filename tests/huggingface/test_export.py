"""Exported folders: transformers computes dtt's logits with them, and what differs is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stock_models import (
    ALPHABET,
    CONTEXT,
    LLAMA,
    MODELS,
    VOCABULARY,
    drift,
    export_of,
    left_over,
    make_run,
    quick_files,
    random_decoder,
)

from dtt.config.data import Data, TokenizerFile
from dtt.config.model import Experts, Learned, Model, NoPositions
from dtt.config.schema import Config
from dtt.config.sources import Text
from dtt.errors import CheckpointError, ConfigError
from dtt.huggingface import export as module
from dtt.huggingface.card import portable
from dtt.huggingface.choice import family_of
from dtt.huggingface.export import open_export
from dtt.huggingface.families import FAMILIES
from dtt.huggingface.folder import open_folder
from dtt.huggingface.origin import with_origin
from dtt.huggingface.settings import to_json
from dtt.huggingface.writer import write_weights
from dtt.tokenizer import CharTokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick_files(monkeypatch)


# --- the same model ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_weights_survive_export_and_return(name: str) -> None:
    model_type, settings = MODELS[name]
    run, ours = make_run(Path("runs") / name, settings)
    folder = export_of(run)
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(CONTEXT)[None] * 7 % VOCABULARY  # every id, and every position
    with torch.no_grad():
        expected, found = ours(tokens), theirs(tokens).logits
    assert expected.std() > 0.3 and drift(expected, found) <= 1e-5

    config = with_origin(Config(name="again", init_from=str(folder)))
    shapes = {name: tuple(t.shape) for name, t in ours.state_dict().items()}
    weights = open_folder(folder, FAMILIES[model_type], config.model, shapes).whole()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(weights[key], tensor), key
    # The model that comes back is the one that went: what is written of it is the same.
    back = to_json(config.model, FAMILIES[model_type], 0, "float32")
    there = json.loads((folder / "config.json").read_text())
    assert {**back, "use_bias": 0} == {**there, "use_bias": 0}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_narrow_types_are_proven_with_the_rounded_weights(dtype: str) -> None:
    run, ours = make_run(Path("runs/small"), LLAMA)
    folder = export_of(run, dtype=dtype)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {kind}
    assert torch.equal(stored["model.norm.weight"], ours.norm.weight.detach().to(kind))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == kind


def test_what_a_narrow_type_cannot_hold_is_refused() -> None:
    made = random_decoder(Model(**LLAMA))
    made.blocks[1].mlp.up.weight.data[0, 0] = 3.4e38
    run, _ = make_run(Path("runs/large"), LLAMA, made=made)
    for dtype, wider in (("fp16", "bf16 or fp32"), ("bf16", "fp32")):
        with pytest.raises(ConfigError) as caught:
            export_of(run, dtype=dtype)
        assert str(caught.value) == (
            f"--dtype {dtype}: a value of model.layers.1.mlp.up_proj.weight is too large for it; "
            f"use {wider}"
        )
    assert left_over() == []


@pytest.mark.parametrize("to", ["hf", "safetensors"])
def test_values_that_are_not_finite_are_not_exported(to: str) -> None:
    made = random_decoder(Model(**LLAMA))
    made.blocks[1].mlp.up.weight.data[0, 0] = float("nan")
    run, _ = make_run(Path("runs/spoilt"), LLAMA, made=made)
    with pytest.raises(CheckpointError) as caught:
        export_of(run, to)
    assert str(caught.value) == (
        "checkpoint runs/spoilt/checkpoints/step-00000007: blocks.1.mlp.up.weight has values that "
        "are not finite; export one from before that"
    )
    assert left_over() == []


def test_large_models_are_several_files_with_an_index() -> None:
    run, ours = make_run(Path("runs/small"), LLAMA)
    export, folder = open_export(run, "last", "hf", "fp32"), Path("exports/parts")
    whole = export_of(run)
    shutil.copytree(whole, folder)
    (folder / "model.safetensors").unlink()
    total = write_weights(folder, export.rows(), torch.float32, largest=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and {path.name for path in files} == set(index["weight_map"].values())
    assert max(path.stat().st_size for path in files) < 25_000
    assert total == index["metadata"]["total_size"] == 4 * sum(p.numel() for p in ours.parameters())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert drift(ours(tokens), loaded(tokens).logits) <= 1e-5
    config = with_origin(Config(init_from=str(folder)))
    shapes = {name: tuple(t.shape) for name, t in ours.state_dict().items()}
    weights = open_folder(folder, FAMILIES["llama"], config.model, shapes).whole()
    assert all(torch.equal(weights[key], tensor) for key, tensor in ours.state_dict().items())


def test_safetensors_take_every_model_under_its_own_names() -> None:
    settings = LLAMA | {"positions": NoPositions(), "experts": Experts(number=4, shared=1)}
    run, ours = make_run(Path("runs/odd"), settings)
    folder = export_of(run, "safetensors")
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == ours.state_dict().keys()
    assert all(torch.equal(stored[key], tensor) for key, tensor in ours.state_dict().items())
    assert {p.name for p in folder.iterdir()} == {
        *("model.safetensors", "config.yaml", "tokenizer.json", "README.md")
    }
    kept = json.loads((folder / "tokenizer.json").read_text())
    assert kept["alphabet"] == "".join(sorted(ALPHABET))


# --- what no architecture has --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"positions": NoPositions()}, "model.positions none (it has rotary)"),
        ({"positions": Learned()}, "model.positions learned (it has rotary)"),
        ({"activation": "relu2"}, "model.norm rmsnorm (it has layernorm)"),
        ({"bias": True, "window": 4}, "model.window on (it has off)"),
        ({"bias": True, "qk_norm": True}, "model.qk_norm on (it has off)"),
        ({"experts": Experts(number=4, shared=1)}, "model.experts.shared 1 (it has 0)"),
        ({"experts": Experts(number=4, scoring="sigmoid")}, "model.experts.scoring sigmoid"),
        ({"experts": Experts(number=4, balance="bias")}, "model.experts.balance bias"),
        ({"experts": Experts(number=4, every=2)}, "model.qk_norm off (it has on)"),
    ],
)
def test_a_setting_that_no_architecture_has_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        family_of(Model(**LLAMA | changes))
    assert named in caught.value.what
    for family in FAMILIES.values():
        assert family.summary in caught.value.fix
    assert "--to safetensors always works" in caught.value.fix


# --- tokenizers ----------------------------------------------------------------------------------


def test_a_tokenizer_that_is_off_by_one_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run(Path("runs/small"), LLAMA)
    whole = module.tokenizer_files

    def shifted(*given: Any) -> dict[str, str]:
        files = dict(whole(*given))
        data = json.loads(files["tokenizer.json"])
        vocabulary = data["model"]["vocab"]
        vocabulary |= {"a": vocabulary["b"], "b": vocabulary["a"]}
        return files | {"tokenizer.json": json.dumps(data)}

    monkeypatch.setattr(module, "tokenizer_files", shifted)
    folder = export_of(run)
    assert not list(folder.glob("*token*"))
    assert "the tokenizer is left out" in capsys.readouterr().err
    assert "okenizer" not in (folder / "README.md").read_text().partition("## Settings")[0]


def test_a_tokenizer_that_transformers_cannot_load_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run(Path("runs/small"), LLAMA)
    whole = module.tokenizer_files

    def unknown(*given: Any) -> dict[str, str]:
        files = dict(whole(*given))
        data = json.loads(files["tokenizer.json"])
        data["model"]["type"] = "of-tomorrow"
        return files | {"tokenizer.json": json.dumps(data)}

    monkeypatch.setattr(module, "tokenizer_files", unknown)
    folder = export_of(run)
    assert not list(folder.glob("*token*"))
    err = capsys.readouterr().err
    assert "the tokenizer is left out" in err and "it cannot load it (" in err
    assert err.count("\n") == 1


# --- the command ---------------------------------------------------------------------------------


def test_the_command_says_what_was_proven_and_replaces_only_exports(dtt: Any) -> None:
    make_run(Path("runs/book"), LLAMA)
    code, out, err = dtt("export", "runs/book")
    assert (code, err) == (0, "") and "exports/book-hf" in out
    assert "LlamaForCausalLM, fp32" in out and "transformers gives the tokens of dtt" in out
    code, _, err = dtt("export", "runs/book")
    assert code == 2 and err == (
        "dtt export: error: exports/book-hf is there already; give --force, or another -o FOLDER\n"
    )
    before = (Path("exports/book-hf/model.safetensors")).stat().st_ino
    assert dtt("export", "runs/book", "--force")[0] == 0
    assert Path("exports/book-hf/model.safetensors").stat().st_ino != before
    assert left_over() == ["book-hf"]
    code, _, err = dtt("export", "runs/book", "-o", "runs/book", "--force")
    assert code == 2 and "is no exported model" in err and err.count("\n") == 1
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("mine")
    assert dtt("export", "runs/book", "-o", "notes", "--force")[0] == 2
    assert Path("notes/a.txt").read_text() == "mine"


@pytest.mark.parametrize("where", [".", "..", "../here", "/"])
def test_a_folder_that_one_stands_in_is_not_replaced(
    where: str, dtt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = make_run(tmp_path / "runs" / "book", LLAMA)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir("here")
    code, _, err = dtt("export", str(run), "-o", where)
    assert (code, err) == (
        2,
        f"dtt export: error: {where} is the folder that you are in, or above it, and an export "
        "takes the place of a whole folder; give -o the name of a new one\n",
    )
    assert left_over(Path()) == [] and sorted(left_over(tmp_path)) == ["here", "runs"]


def test_without_transformers_the_command_names_the_package(
    dtt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(Path("runs/book"), LLAMA)
    find = module.require_transformers.__globals__["importlib"].util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n, *a: None if n == "transformers" else find(n, *a)
    )
    code, _, err = dtt("export", "runs/book")
    assert (code, err) == (
        2,
        "dtt export: error: checking the exported model needs the Python package 'transformers'; "
        "pip install 'dtt[hf]', or give --no-verify\n",
    )
    code, _, err = dtt("export", "runs/book", "--no-verify")
    assert code == 0 and "neither logits nor tokens were compared" in err
    assert dtt("export", "runs/book", "--to", "safetensors")[0] == 0


def test_the_card_has_facts_and_no_places(dtt: Any, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "runs" / "book", LLAMA)
    row = {"step": 7, "val_loss": 1.25, "val_bits_per_byte": 0.5, "val_floor": 0.25}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert dtt("export", str(run), "-o", "book-model")[0] == 0
    assert 'from_pretrained("book-model")' in Path("book-model/README.md").read_text()
    assert dtt("export", str(run))[0] == 0
    text = Path("exports/book-hf/README.md").read_text()
    assert 'from_pretrained("book-hf")' in text and "up to 96 tokens" in text
    for fact in ("12,345", "1.2500", "0.5000 (the lowest possible is 0.2500)", "0123456789ab"):
        assert fact in text
    assert str(tmp_path) not in text and "library_name: transformers" in text
    for path in Path("exports/book-hf").glob("*.json"):
        assert str(tmp_path) not in path.read_text()


def test_settings_are_told_without_the_places_of_files() -> None:
    source = Text(path=("/home/me/secret/book.txt", "/home/me/more/*.txt"))
    tokenizer = TokenizerFile(path=Path("/home/me/secret/tokenizer.json"))
    config = Config(
        dir=Path("/home/me/runs"),
        init_from="/home/me/secret/model",
        tokenizer=tokenizer,
        data=Data(source=source, dir=Path("/home/me/data")),
    )
    tree = portable(config)
    assert "/" not in str(tree["data"]) + str(tree["tokenizer"]) + str(tree["init_from"])
    assert tree["data"]["source"]["path"] == ["book.txt", "*.txt"]
    assert tree["init_from"] == "model" and "dir" not in tree
    assert portable(Config(init_from="org/name@abc"))["init_from"] == "org/name@abc"


def test_a_model_without_stock_architecture_leaves_nothing(dtt: Any) -> None:
    make_run(Path("runs/odd"), LLAMA | {"positions": NoPositions()})
    code, _, err = dtt("export", "runs/odd")
    assert code == 2 and "model.positions none" in err and err.count("\n") == 1
    assert left_over() == []


def test_the_folder_of_a_run_of_another_tokenizer_ends_texts_with_its_own() -> None:
    tokenizer = CharTokenizer("xyz")
    run, _ = make_run(Path("runs/xyz"), LLAMA, tokenizer=tokenizer)
    folder = export_of(run)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded("xyz?")["input_ids"] == [0, 2, 3, 4, 1]
