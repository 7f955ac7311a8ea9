"""`dtt doctor`: examine this machine, or each machine of a launch and then all of them together."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from dtt.config.schema import Config
from dtt.doctor.bench import Bench
from dtt.doctor.examination import examine
from dtt.doctor.finding import Finding, Subject
from dtt.doctor.report import Node, Printer, as_json, exit_code
from dtt.errors import DttError
from dtt.place import find_place
from dtt.reporting import report_error


def visit(
    config: Config, error: DttError | None, *, quick: bool, as_document: bool, debug: bool
) -> int:
    """Examine, report, and return the exit code. `error`: why the configuration did not load.

    Several ranks end here, all with the same code; the main one prints.
    """
    begun, place = time.perf_counter(), find_place(os.environ)
    subject = Subject(config, place, dict(os.environ), Bench(debug), error, quick)
    if place.ranks == 1:
        printer = None if as_document else Printer()
        node = Node(os.uname().nodename, 1, examine(subject, printer))
        return _report([node], [], begun, printer)

    from dtt.dist import leave  # both load torch
    from dtt.doctor.nodes import examine_nodes

    try:
        nodes, shared = examine_nodes(subject)
    except DttError as apart:
        leave(report_error("dtt doctor", apart))
    if place.rank:
        leave(exit_code([*(f for node in nodes for f in node.findings), *shared]))
    printer = None if as_document else Printer()
    if printer is not None:
        printer.nodes(nodes, shared)
    return leave(_report(nodes, shared, begun, printer))


def _report(
    nodes: Sequence[Node], shared: Sequence[Finding], begun: float, printer: Printer | None
) -> int:
    """Print what comes last, or all of it as JSON where nothing is printed before; return the exit
    code."""
    seconds = time.perf_counter() - begun
    everything = [*(finding for node in nodes for finding in node.findings), *shared]
    if printer is None:
        print(as_json(nodes, shared, seconds))
    else:
        printer.summary(everything, seconds)
    return exit_code(everything)
