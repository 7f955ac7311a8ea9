"""The checks of one machine, in the order in which they are made and shown."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

from dtt.doctor import disk, gpu, hub, limits, link, network, processor, settings, software, trial
from dtt.doctor.bench import UnmeasuredError, short
from dtt.doctor.finding import (
    DATA,
    PEERS,
    SETUP,
    STORAGE,
    Check,
    Finding,
    Subject,
    failed,
    skipped,
)
from dtt.errors import DttError

CHECKS = (
    Check("python", "software", SETUP, software.check_python),
    Check("packages", "software", SETUP, software.check_packages),
    Check("extras", "software", SETUP, software.check_extras),
    Check("pytorch", "software", SETUP, software.check_pytorch),
    Check("cores", "machine", SETUP, processor.check_cores),
    Check("memory", "machine", SETUP, processor.check_memory),
    Check("matmul", "machine", SETUP, processor.check_matmul, slow=True),
    Check("copy", "machine", SETUP, processor.check_copy, slow=True),
    Check("GPUs", "machine", SETUP, gpu.check_gpus),
    Check("all-reduce", "machine", PEERS, link.check_all_reduce, slow=True),
    Check("host name", "network", PEERS, network.check_host_name),
    Check("interfaces", "network", PEERS, network.check_interfaces),
    Check("port", "network", PEERS, network.check_port),
    Check("loopback", "network", PEERS, network.check_loopback),
    Check("hub", "network", DATA, hub.check_hub),
    Check("shared memory", "limits", STORAGE, limits.check_shared_memory),
    Check("open files", "limits", SETUP, limits.check_open_files),
    Check("locked memory", "limits", SETUP, limits.check_locked_memory),
    Check("configuration", "run", SETUP, settings.check_settings),
    Check("layout", "run", SETUP, settings.check_layout),
    Check("data", "run", DATA, settings.check_data),
    Check("tokenizer", "run", DATA, settings.check_tokenizer),
    Check("model", "run", SETUP, settings.check_model),
    Check("files", "disk", STORAGE, disk.check_files),
    Check("disk speed", "disk", STORAGE, disk.check_speed, slow=True),
    Check("disk space", "disk", STORAGE, disk.check_space),
    Check("compiler", "training", SETUP, trial.check_compiler, slow=True),
    Check("one rank", "training", SETUP, trial.check_one_rank),
    Check("two ranks", "training", PEERS, trial.check_two_ranks, slow=True),
)
"""A later one may use what an earlier one has told the Subject."""

MENDS = {
    SETUP: "`dtt doctor --debug` shows where; if it is not the machine, please report it",
    DATA: "check data.source and tokenizer",
    STORAGE: "choose another folder with --checkpoint-dir, or mend this one",
    PEERS: "check addresses, interfaces and the firewall; `dtt doctor --debug` shows more",
}
"""What to say of a failure that does not explain itself, by the kind of its check."""


class Listener(Protocol):
    """Who is told what is examined and found, as it goes on."""

    def begin(self, name: str) -> None:
        """A check begins."""

    def tell(self, finding: Finding) -> None:
        """It has found something."""


def examine(subject: Subject, listener: Listener | None = None) -> list[Finding]:
    """Make all checks and return what they find; never raises."""
    subject.busy = processor.busy_cores()
    subject.bench.warm_up()
    found = []
    for check in CHECKS:
        if listener is not None:
            listener.begin(check.name)
        for finding in _findings(check, subject):
            found.append(finding)
            if listener is not None:
                listener.tell(finding)
    return found


def _findings(check: Check, subject: Subject) -> Iterator[Finding]:
    """What a check finds; what it raises is its failure."""
    start = time.perf_counter()
    if check.slow and subject.quick:
        yield _named(skipped("not measured with --quick"), check, start)
        return
    try:
        for finding in check.examine(subject):
            yield _named(finding, check, start)
            start = time.perf_counter()
    except DttError as error:
        fix = error.fix or MENDS[check.code]
        finding = failed(short(error.what), fix)
        yield replace(_named(finding, check, start), code=error.exit_code)
    except UnmeasuredError as error:  # whose traceback the other process has shown
        yield _named(failed(str(error), MENDS[check.code]), check, start)
    except Exception as error:  # a check that breaks must not keep the others from being made
        if subject.bench.debug:
            traceback.print_exc()
        text = f"{type(error).__name__}: {short(str(error))}"
        yield _named(failed(text, MENDS[check.code]), check, start)


def _named(finding: Finding, check: Check, start: float) -> Finding:
    return replace(
        finding,
        name=finding.name or check.name,
        group=check.group,
        code=check.code,
        seconds=round(time.perf_counter() - start, 3),
    )
