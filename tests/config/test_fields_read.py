"""Every setting is read by something: a setting that nothing reads is a promise not kept."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dtt
from dtt.config.fields import leaves

PACKAGE = Path(dtt.__file__).parent


def attributes_read() -> set[str]:
    """Names of attributes that the code outside of dtt/config reads."""
    return {
        node.attr
        for path in PACKAGE.rglob("*.py")
        if PACKAGE / "config" not in path.parents
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


READ = attributes_read()


# The preset has done its work when the configuration is there; it is kept as information.
@pytest.mark.parametrize("path", [path for path in leaves() if path != "model.preset"])
def test_a_setting_is_read(path: str) -> None:
    assert path.rpartition(".")[2] in READ, f"nothing outside of dtt/config reads {path}"
