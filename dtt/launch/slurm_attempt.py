"""What a Slurm batch script asks at the start and at the end of an attempt (no torch here).

`python -m dtt.launch.slurm_attempt begin` writes down that it runs; `end` finds out why the ranks
ended (`slurm_verdict`), writes that down, and has the job run again where that is right: by
`scontrol requeue`, or as a new job where the partition does not allow it. Its exit code is the
batch script's. `folder` prints where a configuration's run is.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
from pathlib import Path

from dtt.errors import EXIT_DONE, ConfigError, PeerError
from dtt.launch.attempts import Record, attempts_of, record_of
from dtt.launch.slurm_verdict import (
    EXIT_NO_PROGRESS,
    LOST,
    MOST_IDLE,
    Verdict,
    decide,
    idle,
    read_messages,
    worn,
)
from dtt.metrics.progress import read_progress
from dtt.nodelist import expand_nodes
from dtt.reporting import report_error
from dtt.runs import newest_step

PATIENCE = 60.0
"""Seconds that Slurm's own commands may take."""
PROG = "dtt launch"


def main(argv: list[str]) -> int:
    """Do what the batch script asks, and return its exit code."""
    # `scontrol requeue` ends the job that asks for it, this process included.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        if argv[:1] == ["folder"]:
            return _folder(argv[1:])
        parser = argparse.ArgumentParser(prog="python -m dtt.launch.slurm_attempt")
        parser.add_argument("event", choices=("begin", "end"))
        parser.add_argument("--run", type=Path, required=True)
        parser.add_argument("--job", required=True)
        parser.add_argument("--chain", required=True, help="first job of those that go on")
        parser.add_argument("--nodes", required=True, help="SLURM_JOB_NODELIST")
        parser.add_argument("--code", type=int, default=0, help="exit code of srun")
        parser.add_argument("--messages", type=Path, required=True, help="what srun said")
        cut = argv.index("--") if "--" in argv else len(argv)  # then: what the batch script got
        options = parser.parse_args(argv[:cut], argparse.Namespace(rest=argv[cut + 1 :]))
        return begin(options) if options.event == "begin" else end(options)
    except Exception as error:
        return report_error(PROG, error)


def _folder(argv: list[str]) -> int:
    from dtt.launch.arguments import train_parser

    parser = train_parser()
    options = parser.parse(argv)
    if options.fresh:
        raise ConfigError(
            "--fresh in a Slurm job would remove the run whenever the job begins again",
            "remove the old run's folder by hand, or give this one another --name",
        )
    config = parser.config(options)
    print(config.dir / str(config.name))
    return EXIT_DONE


def begin(options: argparse.Namespace) -> int:
    """Write down that an attempt begins; not 0 if it must not."""
    run, record, step = options.run, record_of(options.run), newest_step(options.run)
    if (lost := record.open_attempt(options.chain)) is not None:
        said, nodes = read_messages(_messages(options), LOST, lost["nodes"]), lost["nodes"]
        failed = sorted({*said.failed, *_down(nodes)} & {*nodes})
        why = "Slurm ended it" + (f" when {','.join(failed)} was lost" if failed else "")
        _ended(record, options, lost["job"], step, LOST, failed, why)
    options.messages.write_text("", encoding="utf-8")  # what follows is of this attempt
    attempts = attempts_of(record.rows(), options.chain)
    number = len(attempts) + 1
    if (count := idle(attempts)) >= MOST_IDLE:
        _say(f"{count} attempts in a row saved no new checkpoint; see {run}/logs, and submit again")
        return EXIT_NO_PROGRESS
    nodes = list(expand_nodes(options.nodes))
    facts = {"job": options.job, "chain": options.chain, "nodes": nodes, "step": step}
    record.add("begun", **facts)
    if used := sorted(set(nodes) & set(worn(attempts))):
        # It counts as an attempt: where Slurm does not leave nodes out this must end, too.
        why = f"{','.join(used)} failed twice"
        _ended(record, options, options.job, step, PeerError.exit_code, (), why)
        _say(f"attempt {number}: not on {','.join(used)}, which failed twice; going on without")
        _again(record, options, worn(attempts))
        return PeerError.exit_code
    where = f"goes on from step {step}" if step else "starts"
    _say(f"attempt {number}: {run} {where} on {options.nodes} (job {options.job})")
    return EXIT_DONE


def end(options: argparse.Namespace) -> int:
    """Write down how an attempt ended, have it go on where it should; return its exit code."""
    record, step = record_of(options.run), newest_step(options.run)
    ended = read_messages(_messages(options), options.code, list(expand_nodes(options.nodes)))
    _ended(record, options, options.job, step, ended.code, ended.failed, "")
    attempts = attempts_of(record.rows(), options.chain)
    verdict = decide(ended, attempts, cancelled=_is_cancelled(options.job))
    _say(_summary(verdict, len(attempts), options.run))
    if verdict.action == "again":
        _again(record, options, verdict.exclude)
    return verdict.code


def _ended(
    record: Record,
    options: argparse.Namespace,
    job: str,
    step: int,
    code: int,
    failed: list[str] | tuple[str, ...],
    why: str,
) -> None:
    facts = {"job": job, "chain": options.chain, "code": code, "failed": list(failed)}
    record.add("ended", **facts, step=step, why=why)


def _messages(options: argparse.Namespace) -> str:
    path: Path = options.messages
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _summary(verdict: Verdict, number: int, run: Path) -> str:
    progress = read_progress(run)
    planned = f" of {progress.steps}" if progress is not None else ""
    text = f"attempt {number} at step {newest_step(run)}{planned}: {verdict.why}"
    if verdict.action == "again":
        text += "; going on"
    if verdict.exclude:
        text += f" without {','.join(verdict.exclude)}, which failed twice"
    return text


def _say(text: str) -> None:
    print(f"dtt: {text}", flush=True)


# --- what is asked of Slurm -----------------------------------------------------------------------


def _again(record: Record, options: argparse.Namespace, exclude: tuple[str, ...]) -> None:
    """Put the job into the queue again; ConfigError if Slurm does not let it."""
    before = _facts(options.job)
    old = before.get("ExcNodeList", "(null)")
    nodes = ",".join([*([old] if old != "(null)" else []), *exclude])
    requeued = _command("scontrol", "requeue", options.job)
    if requeued.returncode == 0:
        # Only a job that is pending can be told; it is, from this moment on.
        if (
            exclude
            and _command(
                "scontrol", "update", f"JobId={options.job}", f"ExcNodeList={nodes}"
            ).returncode
        ):
            _say(f"could not leave out {nodes}: scontrol update JobId={options.job} refused")
        return
    _resubmit(record, options, nodes, before, requeued.stderr.strip())


def _resubmit(
    record: Record, options: argparse.Namespace, nodes: str, before: dict[str, str], why: str
) -> None:
    """Submit the script that runs as a new job, which starts when this one is over."""
    script = _command("scontrol", "write", "batch_script", options.job, "-")
    flags = [f"--{name}={value}" for name, value in _asked(before).items()]
    flags += [f"--exclude={nodes}"] if nodes else []
    flags += ["--parsable", f"--dependency=afterany:{options.job}", "/dev/stdin", *options.rest]
    done = _command("sbatch", *flags, text=script.stdout)
    if script.returncode or done.returncode:
        problem = (script.stderr or done.stderr or why).strip().splitlines()[-1]
        raise ConfigError(f"Slurm did not take the job again: {problem}", "submit it by hand")
    job = done.stdout.strip().split(";")[0]
    record.add("submitted", job=job, chain=options.chain)
    _say(f"job {options.job} may not be requeued ({why}): job {job} goes on after it")


def _asked(facts: dict[str, str]) -> dict[str, str]:
    """Return what a job was given beside its script, as options of sbatch."""
    names = {
        "partition": "Partition",
        "account": "Account",
        "qos": "QOS",
        "time": "TimeLimit",
        "chdir": "WorkDir",
        "job-name": "JobName",
        "nodes": "NumNodes",
        "cpus-per-task": "CPUs/Task",
        "constraint": "Features",
        "mem": "MinMemoryNode",
        "mem-per-cpu": "MinMemoryCPU",
    }
    found = {option: facts.get(name, "") for option, name in names.items()}
    found["ntasks-per-node"] = facts.get("NtasksPerN:B:S:C", "").partition(":")[0]
    found["gres"] = re.sub(r"\bgres[:/]", "", facts.get("TresPerNode", ""))
    return {option: value for option, value in found.items() if value not in ("", "0", "(null)")}


def _is_cancelled(job: str) -> bool:
    """Whether Slurm has ended the job, asked by a person or not; at its wall time it may go on."""
    facts = _facts(job)
    state = facts.get("JobState", "RUNNING")
    return state != "RUNNING" and facts.get("Reason") != "TimeLimit"


def _facts(job: str) -> dict[str, str]:
    shown = _command("scontrol", "show", "job", "--oneliner", job)
    return dict(re.findall(r"(\S+?)=(\S*)", shown.stdout))


def _down(nodes: list[str]) -> set[str]:
    """Return those of the nodes that Slurm does not reach, or holds for broken."""
    shown = _command("sinfo", "--noheader", "--Node", "-n", ",".join(nodes), "-o", "%N %t")
    rows = [line.split() for line in shown.stdout.splitlines()]
    return {r[0] for r in rows if r[1].endswith("*") or r[1].startswith(("down", "fail", "drain"))}


def _command(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            words, input=text, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 1, "", str(error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
