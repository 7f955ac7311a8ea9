"""Errors in configuration files: one line each, with file and line, and how to mend it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtt.config.load import load_config
from dtt.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, **flags: str) -> None:
    """Load f0.yaml with this text, and flags written section__field."""
    Path("f0.yaml").write_text(text, encoding="utf-8")
    paths = {name.replace("__", "."): value for name, value in flags.items()}
    load_config(["f0.yaml"], {path: (f"--{path}", value) for path, value in paths.items()})


# What stands in f0.yaml, and the error after that name.
BAD = [
    (
        "training:\n  max_step: 2",
        ":2: training.max_step: unknown key, did you mean training.max_steps?",
    ),
    ("name: a\nmodle:\n  dim: 2", ":2: modle: unknown key, did you mean model?"),
    (
        "model: {batch_size: 2}",
        ":1: model.batch_size: unknown key, did you mean training.batch_size?",
    ),
    ("model: {dim: wide}", ":1: model.dim: should be a valid integer, got 'wide'"),
    ("model: {layers: true}", ":1: model.layers: should be a number, got true"),
    ("model:\n  dropout: 1.5", ":2: model.dropout: should be less than 1, got 1.5"),
    ("model: {dropout: .nan}", ":1: model.dropout: should be a finite number, got nan"),
    ("model: 7", ":1: model: should be a section (keys and values), got 7"),
    ("model:\n  dim: 6\n  dim: 12", ":3: duplicate key model.dim (first on line 2)"),
    (
        "a: 1\nmodel:\n  dim: 6\n   heads: 2",
        ":4: invalid YAML: mapping values are not allowed here",
    ),
    ("- a\n- b", ":1: expected sections (key: value)"),
    ("name: 12", ":1: name: should be a valid string, got 12 (quotes make it text)"),
    (
        "optimizer: {name: muno}",
        ":1: optimizer.name: should be one of muon, adamw, adam, sgd, got 'muno'",
    ),
    (
        "optimizer:\n  name: adamw\n  momentum: 0.9",
        ":3: optimizer.momentum: optimizer adamw has no momentum (muon, sgd have it)",
    ),
    ("optimizer: {betas: [0.9]}", ":1: optimizer.betas.1: one value is missing"),
    ("optimizer: {betas: [1, 2, 3]}", ":1: optimizer.betas: has too many values, got [1, 2, 3]"),
    ("data: {source: {name: text}}", ":1: data.source.path: is required by data.source text"),
    (
        "schedule:\n  warmup_steps: 9\ntraining: {max_steps: 3}",
        ":2: schedule.warmup_steps (9) is longer than the run (training.max_steps 3)",
    ),
    (
        "data:\n  packing: auto\n  cleaning: [{min_words: 5}]",
        ":3: data.cleaning.0.name: is required: one of unicode, length, gopher, gopher-repetition, "
        "c4, fineweb, regex-drop, regex-replace, pii, exact-dedup, near-dedup, decontaminate, user",
    ),
    (
        "data: {cleaning: [{name: user, function: nocolon}]}",
        ":1: data.cleaning.0.function: should be module:function, got 'nocolon'",
    ),
    (
        "data: {mixture: [{name: a/b, source: {name: tales}}]}",
        ":1: data.mixture.0.name: should be letters, digits, '.', '_' and '-', got 'a/b'",
    ),
    (
        "data: {source: {name: hub, dataset: a/b/c}}",
        ":1: data.source.dataset: should be a data set's name on the Hub, as in owner/name, "
        "got 'a/b/c'",
    ),
    (
        "name: ../a",
        ":1: name: should be a folder's name: no slashes, no dot or space first, got '../a'",
    ),
    (
        "data: {source: {name: url, urls: []}}",
        ":1: data.source.urls: needs at least one value",
    ),
    (
        "data: {cleaning: [{name: near-dedup, bands: 100000}]}",
        ":1: data.cleaning.0.bands: should be less than or equal to 1000, got 100000",
    ),
    ("model: {preset: gtp2}", ":1: unknown preset 'gtp2', did you mean gpt2?"),
    ("extends: gone.yaml", ":1: extends: gone.yaml: no such file or preset"),
    ("extends: f0.yaml", ":1: extends: files extend each other in a circle: f0.yaml -> f0.yaml"),
    ("extends: 3", ":1: extends: should be a file or preset, or a list of them, got 3"),
    ("model: !!python/object:os.system {}", ":1: unknown YAML tag"),
    ("a: &a [*a]", ": nested too deeply or too large for a configuration"),
    ("a: 1\n---\nb: 2", ":2: invalid YAML: but found another document"),
]


@pytest.mark.parametrize(("text", "line"), BAD)
def test_an_error_names_file_and_line(text: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    found = str(caught.value)
    assert found.startswith(f"f0.yaml{line}") and "\n" not in found
    assert "tag" in line or found == f"f0.yaml{line}"


def test_an_error_in_a_layer_names_its_own_file() -> None:
    Path("base.yaml").write_text("\nmodel:\n  layers: x\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^base.yaml:3: model.layers"):
        load("extends: base.yaml\nmodel: {dim: 8}")
    with pytest.raises(ConfigError, match=r"^preset gpt2:\d+: model: dim \(100\)"):
        load("", model__preset="gpt2", model__dim="100")


def test_every_error_has_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        load("model: {dim: x}\ntraining: {batch_size: 0}", seed="-1")
    assert str(caught.value).splitlines() == [
        "--seed: should be greater than or equal to 0, got -1",
        "f0.yaml:1: model.dim: should be a valid integer, got 'x'",
        "f0.yaml:2: training.batch_size: should be greater than 0, got 0",
    ]


def test_unreadable_files() -> None:
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    Path("folder.yaml").mkdir()
    for name, line in (
        ("binary.yaml", "binary.yaml: not a UTF-8 text file"),
        ("folder.yaml", "folder.yaml: is a directory"),
        ("gone.yaml", "gone.yaml: no such file or preset"),
        ("x" * 300, f"{'x' * 300}: no such file or preset"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config([name])
        assert str(caught.value) == line


def test_a_multiplying_file_ends_at_once() -> None:
    levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 12))
    with pytest.raises(ConfigError, match="too large"):
        load("l0: &l0 [x]\n" + levels)
