"""data.cleaning as settings: errors name the line, what is printed reads back, all is read."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import dtt
from dtt.config.cleaning import Step
from dtt.config.fields import lists
from dtt.config.flags import ConfigParser, docs_page
from dtt.config.help import section_help
from dtt.config.load import json_schema, load_config, to_yaml
from dtt.data.cleaning.chain import CORPUS_WIDE, RULES
from dtt.errors import ConfigError

PACKAGE = Path(dtt.__file__).parent


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, **overrides: str):
    Path("run.yaml").write_text(text, encoding="utf-8")
    flags = {path.replace("__", "."): (f"--{path}", value) for path, value in overrides.items()}
    return load_config(["run.yaml"], flags)


STEPS = """data:
  cleaning:
    - unicode
    - name: gopher
      min_words: 7
      stop_words: [le, la]
    - {name: regex-replace, pattern: "a: [b]", replacement: "\\n"}
"""


def test_a_list_of_steps_reads_back_equal() -> None:
    config = load(STEPS)
    assert [step.name for step in config.data.cleaning] == ["unicode", "gopher", "regex-replace"]
    assert config.data.cleaning[1].stop_words == ("le", "la")
    Path("back.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(["back.yaml"]) == config


def test_steps_on_the_command_line() -> None:
    def cleaning(*words: str):
        parser = ConfigParser("dtt tokenize", "", ())
        return parser.config(parser.parse(["--data.cleaning", *words])).data.cleaning

    assert [step.name for step in cleaning("unicode", "pii")] == ["unicode", "pii"]
    assert [step.name for step in cleaning("unicode,pii")] == ["unicode", "pii"]
    assert cleaning("[{name: length, max_words: 3}]")[0].max_words == 3
    assert [step.name for step in load(STEPS, data__cleaning="pii").data.cleaning] == ["pii"]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("fine", r"run.yaml:3: data.cleaning.0.name: should be one of unicode, .*, got 'fine'"),
        ("7", r"run.yaml:3: data.cleaning.0: should be a section .*, got 7"),
        (
            "{name: gopher, min_wrds: 3}",
            r"run.yaml:3: data.cleaning.0.min_wrds: unknown key, did you mean min_words\?",
        ),
        (
            "{name: gopher, zzz: 3}",
            r"run.yaml:3: data.cleaning.0.zzz: unknown key in data.cleaning",
        ),
        (
            "{name: gopher, min_words: x}",
            r"run.yaml:3: data.cleaning.0.min_words: should be a valid",
        ),
        ("{name: gopher, min_words: true}", "min_words: should be a number, got true"),
        ("user", r"run.yaml:3: data.cleaning.0.function: is required by data.cleaning.0 user"),
        ("{name: user, function: here}", "function: should be module:function, got"),
        ("{name: regex-drop, pattern: 'a(b'}", r"'a\(b' is not a regular expression: missing \)"),
        ("{name: regex-replace, pattern: a, replacement: '\\2'}", "invalid group reference 2"),
        ("length", "the step length has no limit"),
        ("{name: length, min_words: 9, max_words: 8}", r"min_words \(9\) is more than max_words"),
        ("{min_words: 3}", "data.cleaning.0.name: is required: one of unicode, "),
    ],
)
def test_errors_name_the_line(step: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load(f"data:\n  cleaning:\n    - {step}\n")
    assert error.value.exit_code == 2 and len(str(error.value).splitlines()) == 1


def test_every_step_is_there_everywhere() -> None:
    names = set(lists()["data.cleaning"])
    assert names == set(RULES) | set(CORPUS_WIDE) and not set(RULES) & set(CORPUS_WIDE)
    page, text = docs_page(), section_help("dtt tokenize", "data.cleaning", {})
    for name, item in lists()["data.cleaning"].items():
        assert f"**{name}**" in page and f"\n{name}: " in text
        for leaf in item.leaves:
            assert leaf.doc.strip()
            shown = leaf.path != "name"
            assert page.count(f"| `data.cleaning[].{leaf.path}` |") >= shown
        assert f"`{name}`" in (PACKAGE.parent / "docs" / "cleaning.md").read_text(encoding="utf-8")
    schema = json_schema()["$defs"]["Data"]["properties"]["cleaning"]["items"]
    assert set(schema["oneOf"][-1]["enum"]) == names
    json.dumps(schema)


def attributes_read() -> set[str]:
    return {
        node.attr
        for path in (PACKAGE / "data" / "cleaning").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def test_every_setting_is_read() -> None:
    read = attributes_read()
    for name, item in lists()["data.cleaning"].items():
        for leaf in item.leaves:
            # What changes with the version is only the fingerprint, which has all settings in it.
            if (name, leaf.path) != ("user", "version"):
                assert leaf.path in read, f"nothing reads {leaf.path} of {name}"
    assert Step
