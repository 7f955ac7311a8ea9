"""Ranks on two hosts meet, or say which host could not reach which address.

The hosts are network namespaces on this machine: `front0` connects them, `back0` of each leads
nowhere. Their names do not resolve.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from meeting_ranks import Ended, Rank, by_hand

ONE, TWO, PORT = "dttmt1", "dttmt2", "29517"
FRONT = {ONE: "10.77.0.1", TWO: "10.77.0.2"}
BACK = {ONE: "10.78.0.1", TWO: "10.79.0.2"}

pytestmark = [pytest.mark.processes, pytest.mark.thorough]


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)


def must(*words: str) -> None:
    done = ip(*words)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def namespaces() -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    try:
        made = ip("netns", "add", ONE)
    except FileNotFoundError:
        pytest.skip("no ip command (iproute2)")
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    try:
        must("netns", "add", TWO)
        pair = ("type", "veth", "peer", "name", "front0", "netns", TWO)
        must("link", "add", "front0", "netns", ONE, *pair)
        for node in (ONE, TWO):
            pair = ("type", "veth", "peer", "name", "nowhere0", "netns", node)
            must("link", "add", "back0", "netns", node, *pair)
            must("-n", node, "address", "add", f"{BACK[node]}/24", "dev", "back0")
            must("-n", node, "address", "add", f"{FRONT[node]}/24", "dev", "front0")
            for link in ("lo", "front0", "back0", "nowhere0"):
                must("-n", node, "link", "set", link, "up")
        yield
    finally:
        ip("netns", "delete", ONE)
        ip("netns", "delete", TWO)


@pytest.fixture
def hosts(namespaces: None) -> Iterator[None]:
    """Both hosts, with the network as it should be."""
    yield
    ip("-n", ONE, "route", "flush", "type", "blackhole")
    ip("-n", ONE, "link", "set", "front0", "up")


def ranks(folder: Path, seconds: float, *nodes: str, **more: str) -> list[Ended]:
    """Run a rank on each of `nodes`, as a person would start them, and return how they ended."""
    environ = {"MASTER_ADDR": FRONT[ONE], **more}
    started = [
        Rank(folder, str(r), by_hand(r, len(nodes), PORT, **environ), node=node, seconds=seconds)
        for r, node in enumerate(nodes)
        if node
    ]
    return [rank.wait() for rank in started]


def test_two_hosts_meet_on_the_network_that_connects_them(tmp_path: Path, hosts: None) -> None:
    """Though their names do not resolve, which gloo would need to choose an interface."""
    ended = ranks(tmp_path, 30, ONE, ONE, TWO, TWO)
    assert [rank.code for rank in ended] == [0] * 4, ended
    assert all("met 4 through front0" in rank.out and not rank.err for rank in ended)


def test_a_node_that_does_not_come_is_named(tmp_path: Path, hosts: None) -> None:
    more = {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    environ = [by_hand(r, 4, PORT, LOCAL_RANK=str(r), **more) for r in (0, 1)]
    both = [
        Rank(tmp_path, str(r), environ[r] | {"MASTER_ADDR": FRONT[ONE]}, node=ONE, seconds=2)
        for r in (0, 1)
    ]
    ended = [rank.wait() for rank in both]
    assert [rank.code for rank in ended] == [7, 7]
    assert f"ranks 2-3 of 4 (node rank 1) did not come to {FRONT[ONE]}:{PORT}" in ended[0].err


def test_a_firewall(tmp_path: Path, hosts: None) -> None:
    """What leaves rank 0's host for the other one is dropped."""
    must("-n", ONE, "route", "add", "blackhole", f"{FRONT[TWO]}/32")
    zero, one = ranks(tmp_path, 3, ONE, TWO)
    assert (zero.code, one.code) == (7, 7)
    assert "rank 1 of 2 did not come" in zero.err
    said = f"rank 1 did not find rank 0: {TWO} cannot reach {FRONT[ONE]}:{PORT} (no answer): a fire"
    assert said in one.err
    assert f"{TWO} has lo 127.0.0.1, front0 {FRONT[TWO]}, back0 {BACK[TWO]}" in one.err


def test_a_link_that_is_down(tmp_path: Path, hosts: None) -> None:
    must("-n", ONE, "link", "set", "front0", "down")
    zero, one = ranks(tmp_path, 3, ONE, TWO)
    assert (zero.code, one.code) == (7, 7)
    assert f"({FRONT[ONE]} is no address" not in zero.err  # it is one, if of no use
    assert f"{TWO} cannot reach {FRONT[ONE]}:{PORT} (no " in one.err


def test_an_interface_that_leads_nowhere(tmp_path: Path, hosts: None) -> None:
    ended = ranks(tmp_path, 30, ONE, TWO, GLOO_SOCKET_IFNAME="back0")
    assert [rank.code for rank in ended] == [7, 7]
    for rank in ended:
        assert " cannot reach dttmt" in rank.err and "though both reach rank 0" in rank.err
        assert "GLOO_SOCKET_IFNAME (CPUs) or NCCL_SOCKET_IFNAME" in rank.err
        assert f"{ONE} has lo 127.0.0.1, front0 {FRONT[ONE]}, back0 {BACK[ONE]}" in rank.err
    assert len({rank.err for rank in ended}) == 1


def test_a_meeting_point_that_is_every_host_itself(tmp_path: Path, hosts: None) -> None:
    """MASTER_ADDR=127.0.0.1, or a name that /etc/hosts gives to 127.0.1.1."""
    zero, one = ranks(tmp_path, 2, ONE, TWO, MASTER_ADDR="127.0.1.1")
    assert (zero.code, one.code) == (7, 7)
    assert f"(127.0.1.1, where no other host can reach {ONE})" in zero.err
    assert f"nobody listens at 127.0.1.1:{PORT}, which on {TWO} is {TWO} itself" in one.err


def test_a_meeting_point_on_the_wrong_host(tmp_path: Path, hosts: None) -> None:
    zero, one = ranks(tmp_path, 2, ONE, TWO, MASTER_ADDR=FRONT[TWO])
    assert (zero.code, one.code) == (7, 7)
    assert f"({FRONT[TWO]} is no address of {ONE}, where rank 0 is: it has lo 127.0" in zero.err
    assert f"{TWO} reaches {FRONT[TWO]}, but nobody listens at its port {PORT}" in one.err


def test_a_name_that_does_not_resolve(tmp_path: Path, hosts: None) -> None:
    zero, one = ranks(tmp_path, 2, ONE, TWO, MASTER_ADDR=ONE)
    assert (zero.code, one.code) == (7, 7)
    assert f"({ONE}, where rank 0 is, cannot resolve {ONE})" in zero.err
    assert f"{TWO} cannot resolve {ONE} (" in one.err


def test_a_host_that_vanishes_while_the_ranks_wait(tmp_path: Path, hosts: None) -> None:
    environ = {"MASTER_ADDR": FRONT[ONE]}
    both = [
        Rank(tmp_path, str(r), by_hand(r, 3, PORT, **environ), node=node, seconds=25)
        for r, node in enumerate((ONE, TWO))
    ]
    both[0].said("waiting for rank 2 of 3")
    must("-n", ONE, "link", "set", "front0", "down")
    ended = [rank.wait() for rank in both]
    assert [rank.code for rank in ended] == [7, 7]
    assert f"rank 1 on {TWO} (process {both[1].process.pid}) was lost" in ended[0].err
