"""What becomes of a Slurm job when its ranks have ended: pure decisions, no command is run here.

Exit codes 75 (preempted after a good save) and 7 (a peer was lost), and ranks that died by a
signal, are worth another attempt; nothing else is. Three attempts in a row that saved no new
checkpoint end with 76. A node that failed twice is left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dtt.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_PREEMPTED, NoProgressError, PeerError
from dtt.nodelist import expand_nodes

EXIT_NO_PROGRESS = NoProgressError.exit_code
MOST_IDLE = 3
"""Attempts in a row without a new checkpoint after which a job stops."""
MOST_FAILURES = 2
"""Failures after which a node is left out."""
LOST = -1
"""Stands for the exit code of an attempt that Slurm ended with its batch script (a node died)."""
SIGNALLED = 128
"""A rank that died by signal N counts as exit code 128 + N, as in a shell."""
SIGNALS = {
    "Hangup": 1,
    "Interrupt": 2,
    "Quit": 3,
    "Illegal instruction": 4,
    "Aborted": 6,
    "Bus error": 7,
    "Floating point exception": 8,
    "Killed": 9,
    "Out Of Memory": 9,
    "User defined signal 1": 10,
    "Segmentation fault": 11,
    "User defined signal 2": 12,
    "Broken pipe": 13,
    "Terminated": 15,
}
LASTING = {EXIT_INTERRUPTED, 141}
"""Codes above 128 that a rank ends with by itself: a person's Ctrl-C, a reader that went away."""

# srun: error: node[1-2]: tasks 0,2-3: Exited with exit code 7    (or: Killed, Segmentation fault)
TASKS = re.compile(r"srun: error: (\S+): tasks? ([\d,\-]+): (.*?)(?: \(core dumped\))?$")
NODE = re.compile(r"srun: error: Node failure on (\S+)")
FIRST = "First task exited"
"""srun's word before it ends the tasks that are left: what follows is its own doing."""


@dataclass(frozen=True)
class Ended:
    """How the ranks of an attempt ended."""

    code: int
    """The code of the rank that is the cause, 128 + N for signal N."""
    failed: tuple[str, ...] = ()
    """Nodes on which a rank died by a signal, or that Slurm lost."""


@dataclass(frozen=True)
class Attempt:
    """An attempt that is over."""

    job: str
    chain: str
    """The first job of those that go on with each other."""
    begun: int
    """Step of the newest checkpoint when it began."""
    ended: int
    """Step of the newest checkpoint when it ended."""
    failed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What is to happen after an attempt, and the exit code of the batch script."""

    action: Literal["done", "again", "stop"]
    code: int
    why: str
    exclude: tuple[str, ...] = field(default=())
    """Nodes that the next attempt must not have."""


def read_messages(text: str, code: int, nodes: Sequence[str]) -> Ended:
    """Find the cause in srun's messages; `code` is srun's own exit code, of `nodes` it ran on.

    srun returns the highest code of its tasks, which is that of a consequence as often as not: a
    rank that lost another ends with 7 where the other ended with 3.
    """
    codes: list[int] = []
    failed: list[str] = []
    for line in text.splitlines():
        if FIRST in line:
            break
        if lost := NODE.search(line):
            failed += expand_nodes(lost[1])
        elif tasks := TASKS.search(line):
            found = _code(tasks[3])
            if found > SIGNALLED and found not in LASTING:
                failed += expand_nodes(tasks[1])
            codes.append(found)
    lasting = [c for c in codes if not _is_retryable(c) and c != EXIT_DONE]
    died = [c for c in codes if c > SIGNALLED and c not in LASTING]
    if lasting:
        cause = lasting[0]
    elif died or failed:
        cause = died[0] if died else SIGNALLED + SIGNALS["Killed"]
    else:
        # Who lost a rank that was preempted was preempted, too.
        cause = max(codes, key=lambda c: c == EXIT_PREEMPTED, default=code)
    # Where every node of several failed it was not the node.
    unlike = tuple(name for name in dict.fromkeys(failed) if name in nodes)
    return Ended(cause, () if len(unlike) == len(nodes) > 1 else unlike)


def _code(said: str) -> int:
    match = re.fullmatch(r"Exited with exit code (\d+)", said)
    return int(match[1]) if match else SIGNALLED + SIGNALS.get(said, SIGNALS["Killed"])


def _is_retryable(code: int) -> bool:
    if code in (EXIT_PREEMPTED, PeerError.exit_code):
        return True
    return SIGNALLED < code <= SIGNALLED + 64 and code not in LASTING


def decide(ended: Ended, attempts: Sequence[Attempt], *, cancelled: bool) -> Verdict:
    """Return what is to happen after the last of `attempts`, all of one chain of jobs.

    `cancelled`: the job is over for Slurm. Cancelled by a person it must not come back; of a lost
    node Slurm requeues it by itself.
    """
    last = attempts[-1]
    why = describe(ended)
    if ended.code == EXIT_DONE:
        return Verdict("done", EXIT_DONE, why)
    if cancelled:
        return Verdict(
            "stop",
            ended.code,
            f"{why}; Slurm ended the job: cancelled, it stays ended; after a lost node it is "
            "requeued",
        )
    if not _is_retryable(ended.code):
        return Verdict("stop", ended.code, f"{why}: another attempt would fail the same way")
    if (count := idle(attempts)) >= MOST_IDLE:
        return Verdict(
            "stop",
            EXIT_NO_PROGRESS,
            f"{why}; {count} attempts in a row saved no new checkpoint (newest: "
            f"{f'step {last.ended}' if last.ended else 'none'}): see the logs, and submit again "
            "when the cause is fixed",
        )
    return Verdict("again", ended.code, why, worn(attempts))


def idle(attempts: Sequence[Attempt]) -> int:
    """Return how many attempts at the end saved no new checkpoint."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.ended > attempt.begun:
            break
        count += 1
    return count


def worn(attempts: Iterable[Attempt]) -> tuple[str, ...]:
    """Return the nodes that failed twice."""
    failures = Counter(node for attempt in attempts for node in set(attempt.failed))
    return tuple(sorted(node for node, n in failures.items() if n >= MOST_FAILURES))


def describe(ended: Ended) -> str:
    """Say how the ranks ended, in words."""
    meanings: Mapping[int, str] = {
        LOST: "Slurm ended it",
        EXIT_DONE: "complete",
        EXIT_PREEMPTED: "stopped by a signal (75)",
        PeerError.exit_code: "a rank was lost (7)",
        EXIT_INTERRUPTED: "interrupted (130)",
    }
    where = f" on {','.join(ended.failed)}" if ended.failed else ""
    if ended.code in meanings:
        return meanings[ended.code] + where
    if _is_retryable(ended.code):
        names = {number: name for name, number in reversed(SIGNALS.items())}
        number = ended.code - SIGNALLED
        return f"a rank died{where}: {names.get(number, f'signal {number}')}"
    return f"ended with exit code {ended.code}"
