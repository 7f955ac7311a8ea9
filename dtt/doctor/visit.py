"""`dtt doctor`: examine this machine, or each machine of a launch and then all of them together."""

from __future__ import annotations

import os
import time

from dtt.config.schema import Config
from dtt.doctor.bench import Bench
from dtt.doctor.examination import examine
from dtt.doctor.finding import Finding, Subject
from dtt.doctor.report import Node, Printer, as_json, exit_code
from dtt.errors import EXIT_DONE, DttError
from dtt.place import find_place
from dtt.reporting import report_error


def visit(
    config: Config, error: DttError | None, *, quick: bool, as_document: bool, debug: bool
) -> int:
    """Examine, report, and return the exit code. `error`: why the configuration did not load.

    Of several ranks only the main one prints and knows the code; the others return 0, unless they
    could not meet.
    """
    begun, place = time.perf_counter(), find_place(os.environ)
    subject = Subject(config, place, Bench(debug), error, quick)
    printer = None if as_document else Printer()
    shared: list[Finding] = []
    if place.ranks > 1:
        from dtt.dist import leave  # both load torch
        from dtt.doctor.nodes import examine_nodes

        try:
            seen = examine_nodes(subject)
        except DttError as apart:
            leave(report_error("dtt doctor", apart))
        if seen is None:
            leave(EXIT_DONE)
        nodes, shared = seen
        if printer is not None:
            printer.nodes(nodes, shared)
    else:
        found = examine(subject, printer)
        nodes = [Node(os.uname().nodename, 1, found)]
    seconds = time.perf_counter() - begun
    everything = [*(finding for node in nodes for finding in node.findings), *shared]
    if printer is None:
        print(as_json(nodes, shared, seconds))
    else:
        printer.summary(everything, seconds)
    code = exit_code(everything)
    if place.ranks > 1:
        leave(code)
    return code
