"""The shape of the code: what may import what, and how large things may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dtt

ROOT = Path(dtt.__file__).parent
# A module imports from its own row or from lower ones. The longest matching name counts.
ROWS = {
    "dtt.errors": 0,
    "dtt.reporting": 0,
    "dtt.version": 0,
    "dtt.machine": 0,
    "dtt.precision": 0,
    "dtt.dist": 0,
    "dtt.place": 0,
    "dtt.nodelist": 0,
    "dtt.network": 0,
    "dtt.rendezvous": 0,
    "dtt.storage": 0,
    "dtt.runs": 0,
    "dtt.config": 1,
    "dtt.data": 2,
    "dtt.tokenizer": 2,
    "dtt.model": 2,
    "dtt.optim": 2,
    "dtt.metrics": 2,
    "dtt.parallel": 3,
    "dtt.huggingface": 4,
    "dtt.training": 4,
    "dtt.evaluation": 4,
    "dtt.generation": 4,
    "dtt.lightning": 4,
    "dtt.verification": 5,
    "dtt.launch": 5,
    "dtt.doctor": 5,
    "dtt.commands": 6,
    "dtt.cli": 6,
    "dtt.main": 6,
    "dtt.__main__": 6,
}
# The library's front door: it loads its names from their modules when they are asked for.
FRONT = "dtt"
FILES = sorted(ROOT.rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
# What `dtt --help` and a configuration error must not wait for.
HEAVY = {"torch", "numpy", "tokenizers", "tiktoken", "safetensors"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def row_of(name: str) -> int | None:
    """The row of a module; None: the table does not have it."""
    while name:
        if name in ROWS:
            return ROWS[name]
        name = name.rpartition(".")[0]
    return None


def imports(tree: ast.AST, name: str, package: bool) -> Iterator[tuple[str, int]]:
    """Every module that `tree` imports, wherever in it, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                parts = parts[: len(parts) - node.level + package]
                base = ".".join([*parts, base] if base else parts)
            # `from dtt.model import loss` imports dtt.model.loss.
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if _is_module(inner) else base), node.lineno


def _is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def violations(source: str, name: str, package: bool = False) -> list[str]:
    own = row_of(name)
    if own is None:
        return [f"{name} has no row in the table"]
    found = []
    for imported, line in imports(ast.parse(source), name, package):
        if imported.split(".")[0] != "dtt":
            continue
        row = row_of(imported)
        if imported == FRONT or row is None or row > own:
            found.append(f"{name}:{line} (row {own}) imports {imported} (row {row})")
    return found


def test_modules_import_from_their_own_row_or_from_lower_ones() -> None:
    found = [
        line
        for path in FILES
        if name_of(path) != FRONT
        for line in violations(
            path.read_text(encoding="utf-8"), name_of(path), path.name == "__init__.py"
        )
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import dtt.training.loop",
        "import os, dtt.generation as g",
        "from dtt.evaluation import evaluate",
        "from dtt import evaluate",
        "from dtt import generate",
        "from dtt import Config",
        "def f():\n    from dtt.cli import main",
        "if TYPE_CHECKING:\n    from dtt.training.run import Run",
        "from ..train import run",
        "from dtt.unheard_of import x",
    ],
)
def test_an_import_from_a_higher_row_is_found(source: str) -> None:
    assert len(violations(source, "dtt.model.decoder")) == 1


def test_imports_from_the_own_row_and_from_below_are_allowed() -> None:
    source = (
        "import torch\nfrom dtt import storage\nfrom . import loss\nfrom dtt.data import loader"
    )
    assert violations(source, "dtt.model.decoder") == []


def test_config_and_the_command_line_load_nothing_heavy() -> None:
    """At the top of a module, that is; inside of functions they may."""
    found = []
    for path in FILES:
        name = name_of(path)
        if not name.startswith(("dtt.config", "dtt.commands", "dtt.cli", "dtt.main", "dtt.errors")):
            continue
        top = ast.Module(ast.parse(path.read_text(encoding="utf-8")).body, [])
        top.body = [n for n in top.body if isinstance(n, ast.Import | ast.ImportFrom)]
        found += [
            f"{name}:{line} imports {imported}"
            for imported, line in imports(top, name, path.name == "__init__.py")
            if imported.split(".")[0] in HEAVY or (row_of(imported) or 0) in (2, 3, 4)
        ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_modules_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= LONGEST_FILE
    if path.name != "__init__.py" or text.strip():
        assert ast.get_docstring(tree), "no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"
