"""A real Slurm of two nodes on this machine, for tests: own folder, key, ports; nothing in /etc.

munged, slurmctld and two slurmd run as root from one folder. `start` raises AbsentError with the
reason where that cannot be.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dtt.machine import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
NODES = ("node1", "node2")
CONF = """\
ClusterName=dtt
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
ReturnToService=2
KillWait=10
MailProg=/bin/true
MinJobAge=600
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout={patience}
JobRequeue=1
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=100\n"
# Without a file of its own slurmd reads /etc, or mounts what it finds.
CGROUP = "CgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
"""States of jobs that do not come back."""
PATIENCE = 10
"""Seconds without a word after which Slurm holds a node for dead."""
# `cred_expire` lets a requeued job start after seconds instead of two minutes.


class AbsentError(Exception):
    """Slurm cannot run here; the reason is its text."""


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up."""

    folder: Path

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def environ(self) -> dict[str, str]:
        """What Slurm's commands need, and jobs pass on to their ranks."""
        return {"SLURM_CONF": str(self.conf)}

    def command(self, *words: str, env: dict[str, str] | None = None) -> str:
        """Run a command of Slurm and return what it printed."""
        environ = {**(env or os.environ), **self.environ}
        done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return str(done.stdout)

    def state(self, job: str) -> str:
        """Return the state of a job, such as RUNNING, COMPLETED or FAILED."""
        shown = self.command("scontrol", "show", "job", "--oneliner", job)
        return shown.partition("JobState=")[2].split()[0]

    def until(self, true: Callable[[], object], what: str, seconds: float = 120) -> None:
        """Wait for something, or fail saying what did not come."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"{what} did not come in {seconds} s"
            time.sleep(0.1)

    def wait(self, job: str, seconds: float = 180) -> str:
        """Wait until a job is over (not: in the queue again) and return its state."""
        self.until(lambda: self.state(job) in OVER, f"the end of job {job}", seconds)
        return self.state(job)

    def kill_node(self, node: str) -> None:
        """End a node as a power cut would: no process of it has a last word."""
        for pid in _node_processes(f"{self.folder}/slurmd.{node}.log"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd (again)."""
        (self.folder / f"spool.{node}").mkdir(exist_ok=True)
        _run(_find("slurmd"), "-N", node, "-f", str(self.conf), environ=self.environ)

    def clear(self) -> None:
        """Cancel what is left of jobs, and wait until both nodes are free."""
        self.command("scancel", "--user=root", "--quiet")
        self.until(lambda: not self.command("squeue", "-h"), "an empty queue", 60)
        self.await_idle()

    def await_idle(self) -> None:
        """Wait until both nodes are free."""

        def idle() -> bool:
            return self.command("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2"

        self.until(idle, "two free nodes", 60)


def start(folder: Path) -> Cluster:
    """Start a cluster; AbsentError where there is no Slurm, or not the right to start it."""
    for name in DAEMONS:
        _find(name)
    if os.geteuid() != 0:
        raise AbsentError("starting Slurm's daemons needs root")
    host, ports = socket.gethostname().split(".")[0], [free_port() for _ in range(3)]
    cluster = Cluster(folder)
    (folder / "state").mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    text = CONF.format(host=host, port=ports[0], folder=folder, patience=PATIENCE)
    for name, port in zip(NODES, ports[1:], strict=True):
        text += NODE.format(name=name, host=host, port=port)
    text += f"PartitionName=main Nodes={','.join(NODES)} Default=YES State=UP OverSubscribe=NO\n"
    cluster.conf.write_text(text)
    (folder / "cgroup.conf").write_text(CGROUP)
    _run(
        _find("munged"),
        "--force",
        f"--key-file={key}",
        f"--socket={folder}/munge.sock",
        f"--pid-file={folder}/munged.pid",
        f"--log-file={folder}/munged.log",
        f"--seed-file={folder}/munge.seed",
    )
    try:
        _run(_find("slurmctld"), "-c", "-f", str(cluster.conf), environ=cluster.environ)
        for node in NODES:
            cluster.start_node(node)
        cluster.await_idle()
    except BaseException:
        stop(cluster)
        raise
    return cluster


def stop(cluster: Cluster) -> None:
    """End all jobs, wait for them (their steps outlive a slurmd), then the daemons."""
    with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
        cluster.command("scancel", "--user=root", "--quiet")
        cluster.until(lambda: not cluster.command("squeue", "-h"), "an empty queue", 30)
    names = (*(f"slurmd.{node}" for node in NODES), "slurmctld", "munged")
    for name in names:
        pid = _pid(cluster.folder / f"{name}.pid")
        if pid and _lives(pid):
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + 10
            while _lives(pid) and time.monotonic() < deadline:
                time.sleep(0.05)
            if _lives(pid):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster inside of `with`."""
    cluster = start(folder)
    try:
        yield cluster
    finally:
        stop(cluster)


def _node_processes(log: str) -> set[int]:
    """Return a slurmd and its slurmstepd, which have its log open, and all that these started."""
    parents: dict[int, int] = {}
    found: set[int] = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
            parents[int(entry.name)] = int(stat[1])
            if any(os.readlink(link) == log for link in (entry / "fd").iterdir()):
                found.add(int(entry.name))
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _find(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:{PATH}")
    if found is None:
        raise AbsentError(
            f"there is no {name}: apt-get install munge slurmctld slurmd slurm-client"
        )
    return found


def _run(*words: str, environ: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        words, env={**os.environ, **(environ or {})}, capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        raise AbsentError(f"{words[0]} does not start here: {done.stderr.strip()[-300:]}")


def _pid(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _lives(pid: int) -> bool:
    """Whether a process runs; one that is over and that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
