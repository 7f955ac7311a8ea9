"""Layers, presets, unions and the lines of errors: every rule of the configuration, one by one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from dtt.config.fields import leaves
from dtt.config.layers import preset_names, preset_summary
from dtt.config.load import json_schema, load_config, to_yaml
from dtt.config.model import Experts
from dtt.config.schema import Config
from dtt.errors import ConfigError

ROOT = Path(__file__).parents[2]

OK = """# a small character model
name: char
model:
  dim: 192
  heads: 6
training:
  max_steps: 200
  batch_size: 16
optimizer:
  name: adamw
  lr: 0.01
"""


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ok.yaml").write_text(OK, encoding="utf-8")


def load(text: str | None = None, *more: str, **flags: str) -> Config:
    """The configuration of YAML texts and of flags, written section__field."""
    files = []
    for index, body in enumerate([] if text is None else [text, *more]):
        files.append(f"f{index}.yaml")
        Path(files[-1]).write_text(body, encoding="utf-8")
    paths = {name.replace("__", "."): value for name, value in flags.items()}
    return load_config(files, {path: (f"--{path}", value) for path, value in paths.items()})


def test_later_layers_win() -> None:
    assert load().model.dim == Config().model.dim
    assert load("model: {dim: 64}", "training: {max_steps: 7}").model.dim == 64
    assert load("model: {dim: 64}", "model: {dim: 32}").model.dim == 32
    assert load("model: {dim: 64}", "model: {dim: 32}", model__dim="48").model.dim == 48


def test_a_flag_mends_a_value_that_is_wrong_only_together_with_another() -> None:
    with pytest.raises(ConfigError, match=r"dim \(100\) must be divisible by heads \(6\)"):
        load("model: {dim: 100, heads: 6}")
    assert load("model: {dim: 100, heads: 6}", model__heads="5").model.heads == 5


def test_naming_another_union_member_drops_the_old_ones_fields() -> None:
    config = load("optimizer: {name: sgd, momentum: 0.8, nesterov: true}", optimizer__name="adamw")
    assert config.optimizer == type(config.optimizer)()
    assert config.optimizer.name == "adamw"


def test_naming_the_member_in_force_keeps_its_fields() -> None:
    assert load("optimizer: {momentum: 0.5}", optimizer__name="muon").optimizer.momentum == 0.5  # type: ignore[union-attr]


def test_a_field_alone_keeps_the_member_in_force() -> None:
    config = load("optimizer: {name: sgd}", optimizer__lr="0.5")
    assert (config.optimizer.name, config.optimizer.lr) == ("sgd", 0.5)
    assert load(optimizer__lr="0.5").optimizer.name == Config().optimizer.name


def test_members_may_share_a_field_with_different_defaults() -> None:
    names = ("muon", "adamw", "adam", "sgd")
    lrs = {name: load(optimizer__name=name).optimizer.lr for name in names}
    assert lrs["sgd"] == 0.1 and lrs["adamw"] == 1e-3 and lrs["muon"] == 4e-3


def test_unions_nest() -> None:
    config = load("model: {positions: {theta: 5}}", "model: {positions: {factor: 2}}")
    assert (config.model.positions.theta, config.model.positions.factor) == (5, 2)  # type: ignore[union-attr]
    assert load("model: {positions: {theta: 5}}", model__positions__name="none") == load(
        "model: {positions: {name: none}}"
    )


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "model:\n", "model:\n  # dim: 3\noptimizer:\ntraining: {}\n"]
)
def test_an_empty_section_is_empty(text: str) -> None:
    assert load(text).model_copy(update={"name": None}) == Config()


def test_a_section_that_may_be_null_is_null_until_it_has_a_key() -> None:
    assert load("model: {dim: 64}").model.experts is None
    experts = "model: {experts: {number: 8, active: 4}}"
    assert load(experts, "model: {experts: {number: 6}}").model.experts == Experts(
        number=6, active=4
    )
    assert load(experts, "model:\n  experts:\n").model.experts is None
    assert load(experts, "model: {experts: null}").model.experts is None
    again = load(experts, "model: {experts: null}", "model: {experts: {number: 6}}")
    assert again.model.experts == Experts(number=6)
    assert load(model__experts__number="4").model.experts == Experts(number=4)
    with pytest.raises(ConfigError, match=r":1: model\.experts: should be a section"):
        load("model: {experts: 8}")


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "3.0e-4", "0.0003", ".0003", "+3e-04"])
def test_numbers_in_yaml(text: str) -> None:
    assert load(f"optimizer: {{lr: {text}}}").optimizer.lr == 3e-4


def test_yaml_1_2_scalars() -> None:
    assert load("name: no").name == "no"
    assert load("name: 1:30").name == "1:30"
    assert load("name: 2024-01-02").name == "2024-01-02"
    assert load("training: {max_steps: 1e4}").training.max_steps == 10_000
    assert load("seed: 010").seed == 10


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("training.grad_clip", "null", None),
        ("model.dropout", "0", 0.0),
        ("seed", "0", 0),
        ("training.max_steps", "1e4", 10_000),
        ("checkpoint.background", "false", False),
        ("checkpoint.background", "0", False),
        ("optimizer.betas", "0.8,0.9", (0.8, 0.9)),
        ("optimizer.betas", "0.8, 0.9", (0.8, 0.9)),
        ("optimizer.betas", "[0.8, 0.9]", (0.8, 0.9)),
        ("sample.prompts", "a,b", ("a", "b")),
        ("sample.prompts", "Once, there", ("Once, there",)),
        ("sample.prompts", "", ()),
        ("sample.prompts", r"a\nb", ("a\nb",)),
        ("sample.prompts", '["a,b"]', ("a,b",)),
        ("name", "3e-4", "3e-4"),
    ],
)
def test_values_on_the_command_line(path: str, text: str, value: object) -> None:
    found: Any = load(**{path.replace(".", "__"): text})
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


def test_separator_escapes_and_paths_do_not() -> None:
    source = load_config(
        overrides={
            "data.source.name": ("-", "text"),
            "data.source.path": ("-", r"C:\new\table.txt"),
            "data.source.separator": ("-", r"\n\n"),
        }
    ).data.source
    assert source.separator == "\n\n" and source.path == (r"C:\new\table.txt",)  # type: ignore[union-attr]


def test_extends_is_relative_to_the_file_and_lies_below_it() -> None:
    folder = Path("configs")
    folder.mkdir()
    (folder / "base.yaml").write_text("model: {layers: 2, dim: 64}", encoding="utf-8")
    (folder / "other.yaml").write_text("model: {layers: 3}\nseed: 5", encoding="utf-8")
    (folder / "run.yaml").write_text(
        "extends: [base.yaml, other.yaml]\nmodel: {dim: 32}", encoding="utf-8"
    )
    config = load_config(["configs/run.yaml"])
    assert (config.model.layers, config.model.dim, config.seed, config.name) == (3, 32, 5, "run")


def test_a_preset_resets_the_model_below_it_and_yields_to_its_own_layer() -> None:
    below = "model: {dropout: 0.3, window: 8, layers: 2}\ntraining: {batch_size: 2}"
    config = load(below, "model: {preset: gpt2, layers: 3}")
    assert (config.model.dim, config.model.layers, config.model.window) == (768, 3, None)
    assert (config.model.preset, config.training.batch_size) == ("gpt2", 2)
    assert load("model: {preset: gpt2}", model__dim="96").model.dim == 96
    assert load("model: {dim: 96}", model__preset="gpt2").model.dim == 768


def test_a_preset_by_model_is_the_model_alone() -> None:
    assert load(model__preset="nanogpt-char").tokenizer == Config().tokenizer
    assert load_config(["nanogpt-char"]).tokenizer.name == "char"
    assert load_config(["nanogpt-char"]).model == load_config(
        overrides={"model.preset": ("--model", "nanogpt-char")}
    ).model.model_copy(update={"preset": None})


def test_a_file_beats_a_preset_of_the_same_name() -> None:
    Path("gpt2").write_text("model: {dim: 8}", encoding="utf-8")
    assert load_config(["gpt2"]).model.dim == 8


def test_implied_sections_hold_only_where_nothing_is_said() -> None:
    implied = {"tokenizer": {"name": "char"}}
    assert load_config(implied=implied).tokenizer.name == "char"
    assert load_config(["ok.yaml"], implied=implied).tokenizer.name == "char"
    overrides = {"tokenizer.vocab_size": ("-v", "500")}
    assert load_config(overrides=overrides, implied=implied).tokenizer.name == "bpe"
    assert load_config(["nanogpt-char"], implied={"model": {"dim": 8}}).model.dim == 384


def test_a_dataset_file_lies_between_files_and_flags() -> None:
    Path("set.yaml").write_text("repeat: 3\nval_fraction: 0.2", encoding="utf-8")
    Path("run.yaml").write_text("data: {repeat: 2, workers: 1}", encoding="utf-8")
    flags = {"data.val_fraction": ("--data.val_fraction", "0.3")}
    data = load_config(["run.yaml"], flags, dataset="set.yaml").data
    assert (data.repeat, data.workers, data.val_fraction) == (3, 1, 0.3)
    Path("set.yaml").write_text("repeats: 3", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^set.yaml:1: data.repeats: .*data.repeat\?"):
        load_config(dataset="set.yaml")
    Path("set.yaml").write_text("data:\n  repeat: 3", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"-c set\.yaml"):
        load_config(dataset="set.yaml")


@pytest.mark.parametrize(
    ("files", "path", "name"),
    [
        (["ok.yaml"], None, "char"),
        (["ok.yaml", "my run+1.yaml"], None, "char"),
        (["my run+1.yaml"], None, "my-run-1"),
        (["tiny"], None, "tiny"),
        ([], None, Config().data.source.name),
        ([], "books/my book.txt", "my-book"),
        ([], "books/*.txt", "books"),
        ([], "books/", "books"),
    ],
)
def test_the_name_of_a_run(files: list[str], path: str | None, name: str) -> None:
    Path("my run+1.yaml").write_text("seed: 1", encoding="utf-8")
    source = {"data.source.name": ("-", "text"), "data.source.path": ("-", path)} if path else {}
    assert load_config(files, source).name == name  # type: ignore[arg-type]


@pytest.mark.parametrize("name", preset_names())
def test_presets_read_back_equal(name: str) -> None:
    config = load_config([name])
    Path("back.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(["back.yaml"]) == config
    assert preset_summary(name) and not preset_summary(name).startswith("model")
    by_model = load_config(overrides={"model.preset": ("--model", name)})
    Path("back.yaml").write_text(to_yaml(by_model), encoding="utf-8")
    assert load_config(["back.yaml"]) == by_model


def random_value(source: random.Random, leaf_type: str) -> Any:
    kind = leaf_type.split(" ")[0]
    if "|" in leaf_type:
        return source.choice(leaf_type.split("|"))
    if leaf_type.startswith("list of text"):
        return [random_text(source) for _ in range(source.randrange(1, 4))]
    if leaf_type == "list of sections":  # data.cleaning; no other list has such items
        text = random_text(source).replace("\\", "/")
        return ["unicode", {"name": "regex-replace", "pattern": "x+", "replacement": text}]
    numbers = {
        "integer": lambda: source.randrange(1, 5000),
        "number": lambda: source.choice([source.random() * 0.99, 1e-8, 3e-4, 0.5]),
        "true": lambda: source.random() < 0.5,
        "text": lambda: random_text(source),
        "path": lambda: random_text(source),
        "keys": lambda: {"n_layer": 2, "act": random_text(source), "rope": {"theta": 1e6}},
        "2": lambda: [source.random() * 0.9, 0.5],
    }
    return numbers[kind]()


def random_text(source: random.Random) -> str:
    special = [
        "3e-4",
        "yes",
        "null",
        "~",
        "0x1",
        "a: b",
        "#",
        "é\n'\"",
        "\t",
        "-",
        " x ",
        "1_0",
        "{",
    ]
    return source.choice([*special, "".join(chr(source.randrange(33, 0x2FF)) for _ in range(9))])


@pytest.mark.parametrize("seed", range(150))
def test_random_configurations_read_back_equal(seed: int) -> None:
    """A random subset of random values: whatever the schema accepts survives YAML unchanged."""
    source = random.Random(seed)
    tree: dict[str, Any] = {}
    config = Config()
    for leaf in leaves().values():
        if source.random() < 0.3 and leaf.path != "model.preset":
            larger = put(tree, leaf.path.split("."), random_value(source, leaf.type))
            try:
                config, tree = Config.model_validate(larger), larger
            except ValueError:
                continue  # does not go with what is there already
    assert len(config.model_dump(exclude_unset=True)) > 3
    if config.name is None:
        config = config.model_copy(update={"name": "x"})
    Path("back.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(["back.yaml"]) == config


def put(tree: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """A copy of `tree` with one more value; a union's other fields need its name beside them."""
    if not path[1:]:
        return {**tree, path[0]: value}
    defaults = {"optimizer": "muon", "tokenizer": "bpe", "source": "tales", "positions": "rotary"}
    start = {"name": defaults[path[0]]} if path[0] in defaults else {}
    return {**tree, path[0]: put(tree.get(path[0], start), path[1:], value)}


def test_saved_yaml_is_read_alike_by_others() -> None:
    """Plain PyYAML sees the values that dtt wrote (its 1.1 rules would turn `yes` into true)."""
    config = load_config(overrides={"name": ("-n", "yes"), "sample.prompts": ("-", "on,3e-4,1:30")})
    text = to_yaml(config)
    assert text.startswith("# yaml-language-server: $schema=config.schema.json\n")
    assert yaml.safe_load(text) == config.model_dump(mode="json")


def test_json_schema_describes_every_setting() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == {*Config.model_fields, "extends"}
    assert schema["$defs"]["Model"]["properties"]["dim"]["description"]
    assert schema["$defs"]["Model"]["additionalProperties"] is False


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_the_files_in_configs_load(file: Path) -> None:
    if file.parent.name == "project_datasets":
        config = load_config(dataset=str(file))
        assert config.data != Config().data
    else:
        names = {"config": "evening", "corpus": "corpus", "corpus-train": "stories-and-code"}
        assert load_config([str(file)]).name == names[file.stem]


def test_a_source_replaces_a_mixture_and_the_other_way_round(tmp_path: Path) -> None:
    mixed, plain, both = (tmp_path / name for name in ("mixed.yaml", "plain.yaml", "both.yaml"))
    mixed.write_text("data:\n  mixture: [{name: a, source: {name: stdlib}}]\n")
    plain.write_text("data: {source: {name: tales, stories: 7}}\n")
    both.write_text(
        "data:\n  source: {name: tales}\n  mixture: [{name: a, source: {name: tales}}]\n"
    )
    given = {"data.source.name": ("-d", "stdlib")}
    assert load_config([str(mixed)], given).data.mixture == ()
    assert load_config([str(mixed)], given).data.source.name == "stdlib"
    assert load_config([str(mixed), str(plain)]).data.mixture == ()
    last = load_config([str(plain), str(mixed)]).data
    assert len(last.mixture) == 1 and last.source == Config().data.source
    with pytest.raises(ConfigError, match=r"both\.yaml:3: data\.mixture and data\.source are both"):
        load_config([str(both)])
    written = tmp_path / "written.yaml"
    written.write_text(to_yaml(load_config([str(mixed)])))
    assert load_config([str(written)]).data == load_config([str(mixed)]).data
