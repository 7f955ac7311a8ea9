"""The script of `dtt launch ssh`: signals, exit codes, no orphans; with a stand-in and with sshd.

The agents are scripts of bash that save for a moment when they get SIGTERM.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from golden_files import PYTHON, text

from dtt.machine import free_port

pytestmark = [pytest.mark.processes, pytest.mark.thorough]

# As sshd does: the command goes to a shell; what it starts does not get the signals of this side.
SSH = """#!/usr/bin/env bash
for word; do last=$word; done
host=${@: -2:1}
if [ "$host" = gone ]; then echo "ssh: connect to host gone: No route" >&2; exit 255; fi
HOST=$host exec setsid -w env --default-signal sh -c "$last"
"""
# Ends with $RC_HOST after a moment, or with 75 after a save.
AGENT = """#!/usr/bin/env bash
host=${HOST:-here}
trap 'sleep 0.3; echo "$host saved"; echo x >>"$FOLDER/saved"; exit 75' TERM
echo "$host: $*"
echo "$host waits" >&2
echo $$ >>"$FOLDER/pids"
code=RC_$host
for ((k = 0; k < 300; k++)); do
  if [ "$k" = 5 ] && [ -n "${!code:-}" ]; then exit "${!code}"; fi
  sleep 0.1
done
"""


def script(tmp_path: Path, *options: str) -> str:
    """What `dtt launch ssh` writes, with a stand-in for the agent."""
    agent = tmp_path / "agent"
    agent.write_text(AGENT, encoding="utf-8")
    agent.chmod(0o755)
    argv = ["--env", f"FOLDER={tmp_path}", "-c", "tiny", "-b", "12", *options]
    return text("ssh", argv).replace(PYTHON, str(agent)).replace("/home/ann/my work", str(tmp_path))


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the script of some hosts, in a session of its own, with an ssh that stays here."""
    started: list[subprocess.Popen[str]] = []
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH, encoding="utf-8")
    (tmp_path / "bin" / "ssh").chmod(0o755)

    def run(*options: str, **environ: Any) -> subprocess.Popen[str]:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        environ = {**os.environ, "PATH": path, "HOST": "", **environ}
        process = subprocess.Popen(
            ["bash", "-c", script(tmp_path, *options)],
            env=environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def agents(tmp_path: Path) -> list[int]:
    path = tmp_path / "pids"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def running(pids: list[int]) -> list[int]:
    """Those of `pids` that are there and no zombies."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.append(pid)
    return found


@pytest.mark.parametrize(
    ("hosts", "options", "codes", "ends"),
    [
        ("a,b", (), {"RC_a": "0", "RC_b": "0"}, 0),
        ("a,b", (), {"RC_b": "3"}, 3),  # a is told to stop, and ends with 75
        ("a,b", (), {"RC_a": "7", "RC_b": "6"}, 6),  # a lost b: the consequence
        ("a,b", (), {"RC_a": "75"}, 75),
        ("a,b", (), {"RC_a": "137"}, 137),
        ("a,gone", (), {}, 7),
        ("a,b,gone", ("--nodes", "2:3"), {"RC_a": "0", "RC_b": "0"}, 0),
        ("a,b,gone", ("--nodes", "2:3"), {"RC_a": "2"}, 2),
        ("a,b,gone", ("--nodes", "3"), {"RC_b": "0"}, 7),
    ],
)
def test_exit_codes(
    start: Start,
    tmp_path: Path,
    hosts: str,
    options: tuple[str, ...],
    codes: dict[str, str],
    ends: int,
) -> None:
    process = start("--hosts", hosts, *options, **codes)
    out, err = process.communicate(timeout=60)
    assert process.returncode == ends, err
    assert not running(agents(tmp_path))
    first, conf = hosts.split(",")[0], "--rdzv-conf is_host="
    if "gone" not in hosts:  # else it may have been stopped before it said anything
        assert f"[{first}] {first}: -m dtt.launch.elastic" in out
        assert f"[{first}] {first} waits" in err
        assert out.count(f"{conf}true --local-addr {first} -m dtt train -c tiny") == 1
    assert ("dtt launch: error: gone: the ssh connection failed" in err) == ("gone" in hosts)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_lets_all_hosts_save(start: Start, tmp_path: Path, number: int) -> None:
    process = start("--hosts", "a,b")
    wait_for(lambda: len(agents(tmp_path)) == 2)
    # As a terminal does: to the whole group.
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "[a] a saved" in out and "[b] b saved" in out
    assert not running(agents(tmp_path))


def test_a_second_signal_kills(start: Start, tmp_path: Path) -> None:
    process = start("--hosts", "a,b")
    wait_for(lambda: len(agents(tmp_path)) == 2)
    for pid in agents(tmp_path):
        os.kill(pid, signal.SIGSTOP)  # they do not save any more
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 137 and not running(agents(tmp_path))


def test_the_hosts_save_and_stop_when_the_script_is_killed(start: Start, tmp_path: Path) -> None:
    process = start("--hosts", "a,b")
    wait_for(lambda: len(agents(tmp_path)) == 2)
    process.kill()
    wait_for(lambda: not running(agents(tmp_path)))
    assert (tmp_path / "saved").read_text() == "x\nx\n"


def test_a_folder_or_interpreter_that_is_missing_is_named(start: Start, tmp_path: Path) -> None:
    (tmp_path / "bin" / "ssh").write_text(SSH.replace("exec", f"rm -f {tmp_path}/agent; exec"))
    process = start("--hosts", "a")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"[a] dtt launch: error: there is no {tmp_path}/agent here; install dtt" in err


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Path]:
    """A server of this test on two addresses of this machine; returns a configuration for ssh."""
    server = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if server is None or shutil.which("ssh") is None or os.geteuid() != 0:
        pytest.skip("sshd is not here, or this is not root: apt-get install openssh-server")
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host", "user"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(keygen, check=True)
    port = free_port()
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nListenAddress 127.0.0.2\n"
        f"HostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\nStrictModes no\n"
        f"PidFile {tmp_path}/sshd.pid\nUsePAM no\nPasswordAuthentication no\n"
    )
    key = (tmp_path / "host.pub").read_text()
    (tmp_path / "known").write_text("".join(f"[127.0.0.{k}]:{port} {key}" for k in (1, 2)))
    (tmp_path / "config").write_text(
        f"Host *\n Port {port}\n User root\n IdentityFile {tmp_path}/user\n IdentitiesOnly yes\n"
        f" UserKnownHostsFile {tmp_path}/known\n LogLevel ERROR\n"
    )
    process = subprocess.Popen([server, "-D", "-e", "-f", str(tmp_path / "sshd_config")])
    try:
        probe_words = ["ssh", "-F", str(tmp_path / "config"), "127.0.0.1", "true"]
        quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        wait_for(lambda: subprocess.run(probe_words, **quiet).returncode == 0)
        yield tmp_path / "config"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("cut", ["signal", "connection"])
def test_over_a_real_ssh(sshd: Path, tmp_path: Path, cut: str) -> None:
    hosts = ["--hosts", "127.0.0.1,root@127.0.0.2", "--ssh-config", str(sshd)]
    process = subprocess.Popen(
        ["bash", "-c", script(tmp_path, *hosts)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wait_for(lambda: len(agents(tmp_path)) == 2)
    if cut == "signal":
        os.killpg(process.pid, signal.SIGINT)
    else:
        pgrep = ["pgrep", "-g", str(process.pid), "-x", "ssh"]
        found = subprocess.run(pgrep, text=True, stdout=subprocess.PIPE).stdout.split()
        os.kill(int(found[0]), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    wait_for(lambda: not running(agents(tmp_path)))
    assert (tmp_path / "saved").read_text() == "x\nx\n", err
    if cut == "signal":
        assert process.returncode == 75
        assert "[root@127.0.0.2]" in out
    else:
        assert process.returncode == 137  # of the ssh that was killed


if sys.platform != "linux":
    pytest.skip("setsid and /proc are Linux's", allow_module_level=True)
