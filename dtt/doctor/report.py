"""The report: a line for each finding, one more where something is to be mended, and JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dtt.doctor.finding import Finding
from dtt.version import __version__

COLOURS = {"ok": "green", "warning": "yellow", "failed": "red bold", "skipped": "dim"}
MARK, NAME = 7, 14
"""Widths of the first two columns."""


@dataclass(frozen=True)
class Node:
    """What was found on one machine."""

    name: str
    ranks: int
    findings: Sequence[Finding]


class Printer:
    """Prints findings as they come: coloured and wrapped on a terminal, else a line each."""

    def __init__(self) -> None:
        self.console = Console()
        self.group = ""
        self.status = self.console.status("")

    def begin(self, name: str) -> None:
        """Show which check is being made, on a terminal."""
        if self.console.is_terminal:
            self.status.update(name)
            self.status.start()

    def tell(self, finding: Finding, where: str = "") -> None:
        """Print one finding; `where` names the machines that it is about."""
        self.status.stop()
        if finding.group != self.group:
            if self.group:
                self.console.print()
            self.group = finding.group
            self.console.print(Text(finding.group, style="bold"))
        text = f"{where}: {finding.measured}" if where else finding.measured
        self.line(finding.status, finding.name, text)
        if finding.mend:
            self.line("", "", f"-> {finding.mend}")

    def line(self, mark: str, name: str, text: str) -> None:
        if not self.console.is_terminal:
            print(f"  {mark:<{MARK}}  {name:<{NAME}}  {text}", flush=True)
            return
        row = Table.grid(padding=(0, 2))
        row.add_column(width=MARK)
        row.add_column(width=NAME)
        row.add_column(overflow="fold")
        colour = COLOURS.get(mark, "yellow")
        body = Text(text, style="" if mark in ("ok", "warning", "failed") else colour)
        row.add_row(Text(mark, style=colour), Text(name), body)
        self.console.print(Padding(row, (0, 0, 0, 2)))

    def nodes(self, nodes: Sequence[Node], shared: Sequence[Finding]) -> None:
        """Print each check with what every node says, in one line where that is the same; then
        what concerns all of them."""
        names = dict.fromkeys((f.group, f.name) for node in nodes for f in node.findings)
        for group, name in names:
            found = [
                (node.name, finding)
                for node in nodes
                for finding in node.findings
                if (finding.group, finding.name) == (group, name)
            ]
            said = {(f.status, f.measured, f.mend) for _, f in found}
            if len(said) == 1 and len(found) == len(nodes):
                self.tell(found[0][1], f"all {len(nodes)} nodes" if len(nodes) > 1 else "")
                continue
            for number, (where, finding) in enumerate(found):
                # A remedy that holds for the next node too is said once.
                same = number + 1 < len(found) and found[number + 1][1].mend == finding.mend
                self.tell(replace(finding, mend="") if same else finding, where)
        for finding in shared:
            self.tell(finding)

    def summary(self, findings: Sequence[Finding], seconds: float) -> None:
        """Print how many there are of each kind, and whether it is fit to train."""
        counts = {s: sum(f.status == s for f in findings) for s in COLOURS}
        bad = next((f for f in findings if f.status == "failed"), None)
        verdict = (
            "fit to train"
            if bad is None
            else f"not fit to train: {bad.name} (exit code {bad.code})"
        )
        parts = ", ".join(f"{n} {s}" for s, n in counts.items() if n)
        self.console.print()
        style = "green" if bad is None and not counts["warning"] else "yellow"
        line = Text(f"{verdict}; {parts}, in {seconds:.0f} s")
        line.stylize(COLOURS["failed"] if bad else style, 0, len(verdict))
        self.console.print(line, soft_wrap=True)
        sys.stdout.flush()


def exit_code(findings: Sequence[Finding]) -> int:
    """Return the code of the first failure; 0 if there is none."""
    return next((f.code for f in findings if f.status == "failed"), 0)


def as_json(nodes: Sequence[Node], shared: Sequence[Finding], seconds: float) -> str:
    """Return the whole report as one JSON document (docs/doctor.md lists its keys)."""
    everything = [f for node in nodes for f in node.findings] + list(shared)
    document: dict[str, Any] = {
        "dtt": __version__,
        "fit": exit_code(everything) == 0,
        "exit_code": exit_code(everything),
        "seconds": round(seconds, 1),
        "nodes": [
            {"name": n.name, "ranks": n.ranks, "checks": [row(f) for f in n.findings]}
            for n in nodes
        ],
        "together": [row(f) for f in shared],
    }
    return json.dumps(document, indent=2)


def row(finding: Finding) -> dict[str, Any]:
    """Return a finding with the documented keys."""
    found = asdict(finding)
    found["exit_code"] = found.pop("code") if finding.status == "failed" else 0
    found.pop("code", None)
    keys = ("name", "group", "status", "measured", "mend", "figures", "exit_code", "seconds")
    return {key: found[key] for key in keys}
