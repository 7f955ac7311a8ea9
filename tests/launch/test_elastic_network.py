"""Two machines with a network between them that is cut: namespaces of the kernel, as root."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import await_step, flags, samples

pytestmark = [pytest.mark.processes, pytest.mark.thorough]
RUN = Path("runs/small")
NAMES = ("dttel1", "dttel2")
HOSTS = "127.0.0.1 localhost\n" + "".join(f"10.79.0.{i} {n}\n" for i, n in enumerate(NAMES, 1))


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


@pytest.fixture
def network() -> Iterator[None]:
    """Two machines, as far as the network goes, with a cable between them."""
    if os.getuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("network namespaces need root, iproute2 and unshare")
    try:
        ip("netns", "add", NAMES[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        ip("netns", "add", NAMES[1])
        ends = [f"{name}v" for name in NAMES]
        cable = ("type", "veth", "peer", "name", ends[1], "netns", NAMES[1])
        ip("link", "add", ends[0], "netns", NAMES[0], *cable)
        for number, (name, end) in enumerate(zip(NAMES, ends, strict=True), 1):
            ip("-n", name, "addr", "add", f"10.79.0.{number}/24", "dev", end)
            for device in (end, "lo"):
                ip("-n", name, "link", "set", device, "up")
            Path("/etc/netns", name).mkdir(parents=True, exist_ok=True)
            Path("/etc/netns", name, "hosts").write_text(HOSTS, encoding="utf-8")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


def cable(state: str) -> None:
    ip("-n", NAMES[1], "link", "set", f"{NAMES[1]}v", state)


def start(name: str, folder: Path, settings: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start the launcher of a machine in its namespace, under a hostname of its own."""
    words = [sys.executable, "-m", "dtt.launch.elastic", "--nnodes", "2", "--rdzv-endpoint"]
    words += [f"{NAMES[0]}:29700", "-m", "dtt", "train", *flags(settings)]
    own = ["bash", "-c", f'hostname {name}; exec "$@"', "machine", *words]
    with (folder / f"{name}.err").open("wb") as err:
        return subprocess.Popen(
            ["ip", "netns", "exec", name, "unshare", "--uts", *own],
            stdout=subprocess.DEVNULL,
            stderr=err,
        )


def restarts(folder: Path) -> list[int]:
    texts = [(folder / f"{name}.err").read_text(encoding="utf-8") for name in NAMES]
    return [text.count("; restart ") for text in texts]


def last_step() -> int:
    lines = (RUN / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return int(json.loads(lines[-1])["step"]) if lines else 0


def await_more(steps: int) -> None:
    await_step(RUN, last_step() + steps)


def test_cuts_of_the_network(folder: Path, network: None) -> None:
    """One of 4 seconds is waited out; after one that lasts too long both machines start again.

    One of 9 seconds may end either way: TCP, which waits twice as long each time, is silent until
    12.6 s after the cut, and a machine is given up after 12 s. The run goes on in both.
    """
    settings = {
        "training.max_steps": "1000000",
        "evaluation.every": "0",
        "logging.every": "1",
        "checkpoint.every": "20",
    }
    machines = [start(name, folder, settings) for name in NAMES]
    try:
        await_step(RUN, 30, 120)
        cable("down")
        time.sleep(4)
        cable("up")
        await_more(20)
        time.sleep(13)  # in which a machine would have been given up
        await_more(20)
        assert restarts(folder) == [0, 0]
        cable("down")
        time.sleep(9)
        cable("up")
        time.sleep(13)
        await_more(20)
        before = restarts(folder)[0]
        assert restarts(folder) == [before, before] and before <= 1
        cable("down")
        time.sleep(14)
        cable("up")
        deadline = time.monotonic() + 60
        while before in restarts(folder) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert restarts(folder) == [before + 1, before + 1]
        time.sleep(1)
        await_more(20)
        machines[1].send_signal(signal.SIGTERM)
        assert [machine.wait(60) for machine in machines] == [75, 75]
    finally:
        for machine in machines:
            machine.kill()
    steps = list(samples(RUN))
    assert steps == list(range(1, len(steps) + 1))
