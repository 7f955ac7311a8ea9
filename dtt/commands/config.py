"""`dtt config`."""

from __future__ import annotations

import json
from pathlib import Path

from dtt.config.flags import docs_page
from dtt.config.layers import preset_names, preset_summary
from dtt.config.load import SCHEMA_FILE, json_schema
from dtt.config.parser import CommandParser

DESCRIPTION = """Show what can be configured.

  presets  the packaged presets, for -c NAME and --model NAME
  schema   the JSON schema of configuration files, for editors
  docs     docs/configuration.md: every setting"""
EXAMPLES = (
    "dtt config presets",
    f"dtt config schema -o {SCHEMA_FILE}",
    "dtt config docs -o docs/configuration.md",
)


def run(argv: list[str]) -> int:
    """Print the chosen text, or write it to a file."""
    usage = "dtt config presets|schema|docs [-o FILE]"
    parser = CommandParser("dtt config", usage, DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "what", choices=("presets", "schema", "docs"), metavar="presets|schema|docs"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to a file instead")
    options = parser.parse(argv)
    text = {"presets": _presets, "schema": _schema, "docs": docs_page}[options.what]()
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text, encoding="utf-8")
    return 0


def _presets() -> str:
    return "".join(f"{name:<20} {preset_summary(name)}\n" for name in preset_names())


def _schema() -> str:
    return json.dumps(json_schema(), indent=2) + "\n"
