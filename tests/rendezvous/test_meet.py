"""Ranks meet, and whoever does not is named, with the reason and the mend."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from meeting_ranks import Ended, Rank, by_hand, free_port
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from dtt.errors import PeerError
from dtt.place import Place, Point, find_place, launch_name
from dtt.rendezvous import meet
from dtt.rendezvous.room import Card, Clock, Room, difference, names_of

processes = pytest.mark.processes
HERE = socket.gethostname()


@pytest.fixture
def port() -> str:
    return free_port()


def every(ranks: list[Rank]) -> list[Ended]:
    return [rank.wait() for rank in ranks]


def same_line(ended: list[Ended]) -> str:
    """The one line that all of them end with."""
    lines = {rank.err.splitlines()[-1] for rank in ended}
    assert len(lines) == 1, lines
    return lines.pop()


# --- what needs no processes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "nodes", "local", "expected"),
    [
        ([3], (), 1, "rank 3 of 4"),
        ([1, 2, 3], (), 1, "ranks 1-3 of 4"),
        ([0, 2, 3], (), 4, "ranks 0, 2-3 of 4"),
        ([2, 3], ("n1", "n1", "n2", "n2"), 2, "ranks 2-3 of 4 (n2)"),
        ([1, 2], ("n1", "n1", "n2", "n2"), 2, "ranks 1-2 of 4 (n1, n2)"),
        ([2, 3], (), 2, "ranks 2-3 of 4 (node rank 1)"),
        ([1, 2], (), 2, "ranks 1-2 of 4 (node ranks 0, 1)"),
    ],
)
def test_names_of_ranks(
    ranks: list[int], nodes: tuple[str, ...], local: int, expected: str
) -> None:
    assert names_of(ranks, 4, nodes, local) == expected


def test_names_of_many_ranks_are_few() -> None:
    nodes = [f"n{rank}" for rank in range(64)]
    assert names_of(range(1, 64, 2), 64, nodes, 1) == (
        "ranks 1, 3, 5, 7, 9, 11, 13, 15 and 24 more of 64 "
        "(n1, n3, n5, n7, n9, n11, n13, n15 and 24 more)"
    )


def test_ranks_that_differ_are_told_in_what_and_where() -> None:
    same = [
        Card(rank, 3, facts={"version": "1.0", "seed": "1"}, host=f"n{rank}") for rank in (0, 1)
    ]
    assert difference(same) is None
    other = Card(2, 3, facts={"version": "0.9", "seed": "1"}, host="n2")
    error = difference([*same, other])
    assert error is not None and error.exit_code == 2
    assert error.what == "ranks differ in their version: 1.0 on rank 0 (n0), 0.9 on rank 2 (n2)"
    lacking = difference([*same, Card(2, 3, facts={"version": "1.0"}, host="n2")])
    assert lacking is not None and "1 on rank 0 (n0), None on rank 2" in lacking.what


def test_two_ranks_on_one_gpu_are_refused() -> None:
    cards = [Card(rank, 3, device=gpu, host="n1") for rank, gpu in enumerate(("a", "b", "a"))]
    assert difference(cards[:2]) is None
    error = difference(cards)
    assert error is not None and error.what == "ranks 0 and 2 on n1 have the same GPU"


# --- meetings ------------------------------------------------------------------------------------


@processes
def test_ranks_meet_in_any_order(tmp_path: Path, port: str) -> None:
    first = [Rank(tmp_path, str(rank), by_hand(rank, 3, port)) for rank in (2, 1)]
    first[0].said("waits for rank 0")  # long enough for a word about it
    ended = every([*first, Rank(tmp_path, "0", by_hand(0, 3, port))])
    assert [rank.code for rank in ended] == [0, 0, 0], ended
    assert all("met 3 through lo" in rank.out for rank in ended)
    word = ended[0].err.splitlines()[0]
    assert word.startswith(f"dtt: rank 2 waits for rank 0: nobody listens at 127.0.0.1:{port}, ")


@processes
def test_a_rank_that_does_not_come_is_named(tmp_path: Path, port: str) -> None:
    several = [Rank(tmp_path, str(r), by_hand(r, 4, port), seconds=3) for r in (0, 2)]
    ended = every(several)
    assert [rank.code for rank in ended] == [7, 7]
    assert same_line(ended).startswith(
        f"dtt: error: ranks 1, 3 of 4 did not come to 127.0.0.1:{port} within 3 s"
    )
    assert "dtt: waiting for ranks 1" in ended[0].err
    assert ended[1].err.count("\n") == 1  # only rank 0 speaks while it waits
    assert all(rank.seconds >= 3 for rank in ended)


@processes
def test_missing_ranks_are_named_by_their_slurm_nodes(tmp_path: Path, port: str) -> None:
    step = {
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "4",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_JOB_ID": "7",
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    second = step | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    ended = every([Rank(tmp_path, str(i), e, seconds=2) for i, e in enumerate((step, second))])
    assert [rank.code for rank in ended] == [7, 7]
    assert "ranks 2-3 of 4 (node2) did not come to" in ended[0].err
    assert "where no other host can reach" in ended[0].err  # 127.0.0.1 for two nodes
    assert ended[1].err == ""  # once on each host


@processes
def test_no_rank_0(tmp_path: Path, port: str) -> None:
    ended = Rank(tmp_path, "1", by_hand(1, 2, port), seconds=1).wait()
    assert ended.code == 7
    assert f"rank 1 did not find rank 0: nobody listens at 127.0.0.1:{port}" in ended.err


@processes
def test_an_address_that_does_not_resolve(tmp_path: Path, port: str) -> None:
    where = by_hand(1, 2, port, MASTER_ADDR="no-such-host.invalid")
    ended = Rank(tmp_path, "1", where, seconds=1).wait()
    assert ended.code == 7
    assert f"{HERE} cannot resolve no-such-host.invalid (" in ended.err
    where = by_hand(0, 2, port, MASTER_ADDR="no-such-host.invalid")
    ended = Rank(tmp_path, "0", where, seconds=1).wait()
    assert ended.code == 7
    assert f"({HERE}, where rank 0 is, cannot resolve no-such-host.invalid)" in ended.err


@processes
def test_an_address_that_is_not_of_rank_0(tmp_path: Path, port: str) -> None:
    ended = Rank(tmp_path, "0", by_hand(0, 2, port, MASTER_ADDR="203.0.113.7"), seconds=1).wait()
    assert ended.code == 7
    assert (
        f"(203.0.113.7 is no address of {HERE}, where rank 0 is: it has lo 127.0.0.1" in ended.err
    )


@pytest.fixture
def web_server() -> Iterator[str]:
    """A port where something else answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    link, _ = server.accept()
                except OSError:
                    return
                with link:
                    link.recv(100)
                    link.sendall(b"HTTP/1.0 400 Bad request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield str(server.getsockname()[1])


@processes
def test_a_port_that_is_taken(tmp_path: Path, web_server: str) -> None:
    ended = Rank(tmp_path, "0", by_hand(0, 2, web_server), seconds=1).wait()
    assert ended.code == 7
    holder = f"(process {os.getpid()}); end it, or set MASTER_PORT"
    assert f"error: port {web_server} of {HERE} is taken by " in ended.err and holder in ended.err
    ended = Rank(tmp_path, "1", by_hand(1, 2, web_server), seconds=1).wait()
    assert ended.code == 7
    assert f"what listens at 127.0.0.1:{web_server} is no store of ranks" in ended.err
    assert ended.err.splitlines()[-1].startswith("dtt: error:") and "frame #" not in ended.err


@processes
def test_a_rank_waits_for_a_port_that_becomes_free(tmp_path: Path, port: str) -> None:
    with socket.create_server(("127.0.0.1", int(port))):
        first = Rank(tmp_path, "0", by_hand(0, 2, port))
        first.said("waiting: port")
    ended = every([first, Rank(tmp_path, "1", by_hand(1, 2, port))])
    assert [rank.code for rank in ended] == [0, 0]


@processes
def test_numbers_of_ranks_that_differ(tmp_path: Path, port: str) -> None:
    ended = every([Rank(tmp_path, str(n), by_hand(n - 2, n, port)) for n in (2, 3)])
    assert [rank.code for rank in ended] == [2, 2]
    line = same_line(ended)
    assert f"rank 1 on {HERE}" in line and "is one of 3 ranks, but rank 0" in line


@processes
def test_a_rank_that_is_there_twice(tmp_path: Path, port: str) -> None:
    first = [Rank(tmp_path, str(r), by_hand(r, 3, port)) for r in (0, 1)]
    first[0].said("waiting for rank 2 of 3")
    double = Rank(tmp_path, "double", by_hand(1, 3, port)).wait()
    assert double.code == 2
    assert f"process {first[1].process.pid}) is there already" in double.err
    ended = every([*first, Rank(tmp_path, "2", by_hand(2, 3, port))])
    assert [rank.code for rank in ended] == [0, 0, 0]  # it did them no harm


@processes
def test_settings_that_differ(tmp_path: Path, port: str) -> None:
    ranks = [
        Rank(tmp_path, str(r), by_hand(r, 2, port), facts={"configuration": f"c{r}"})
        for r in (0, 1)
    ]
    ended = every(ranks)
    assert [rank.code for rank in ended] == [2, 2]
    expected = f"ranks differ in their configuration: c0 on rank 0 ({HERE}), c1 on rank 1 ({HERE})"
    assert expected in same_line(ended)


@processes
def test_two_launches_on_one_port(tmp_path: Path, port: str) -> None:
    """The second says that another launch has the port; the first is undisturbed."""
    step = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "MASTER_ADDR": "127.0.0.1"}
    step |= {"MASTER_PORT": port, "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_JOB_ID": "7"}
    first = Rank(tmp_path, "0", step | {"SLURM_PROCID": "0"})
    first.said("waiting for rank 1 of 2")
    other = step | {"SLURM_PROCID": "1", "SLURM_JOB_ID": "8"}
    stranger = Rank(tmp_path, "stranger", other, seconds=2).wait()
    assert stranger.code == 7 and f"another launch holds 127.0.0.1:{port}" in stranger.err
    ended = every([first, Rank(tmp_path, "1", step | {"SLURM_PROCID": "1"})])
    assert [rank.code for rank in ended] == [0, 0]


@processes
@pytest.mark.parametrize(
    ("name", "said"),
    [("eth77", "is no interface of"), ("lo,eth77", "is no interface of"), ("lo", None)],
)
def test_an_interface_that_is_named(tmp_path: Path, port: str, name: str, said: str | None) -> None:
    environ = [by_hand(rank, 2, port, GLOO_SOCKET_IFNAME=name) for rank in (0, 1)]
    ended = every([Rank(tmp_path, str(rank), environ[rank], seconds=10) for rank in (0, 1)])
    if said is None:
        assert [rank.code for rank in ended] == [0, 0], ended
        return
    assert [rank.code for rank in ended] == [2, 2]
    assert f"GLOO_SOCKET_IFNAME={name} {said} {HERE}; it has lo 127.0.0.1" in ended[0].err


# --- ranks that go away --------------------------------------------------------------------------


@processes
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_ends_the_waiting_at_once(
    tmp_path: Path, port: str, number: int, code: int, rank: int
) -> None:
    """...of that rank with its code, and of the others with 7."""
    ranks = [Rank(tmp_path, str(r), by_hand(r, 3, port), seconds=50) for r in (0, 1)]
    ranks[0].said("waiting for rank 2 of 3")
    ranks[rank].signal(number)
    ended = every(ranks)
    assert ended[rank].code == code and ended[1 - rank].code == 7
    assert max(end.seconds for end in ended) < 30
    reason = "was stopped while the ranks met" if rank else "ended while rank 1"
    assert reason in ended[1 - rank].err


@processes
@pytest.mark.thorough
def test_a_rank_that_dies_while_it_waits(tmp_path: Path, port: str) -> None:
    ranks = [Rank(tmp_path, str(r), by_hand(r, 3, port), seconds=50) for r in (0, 1)]
    ranks[0].said("waiting for rank 2 of 3")
    ranks[1].signal(signal.SIGKILL)
    ended = ranks[0].wait()
    assert ended.code == 7
    dead = f"rank 1 on {HERE} (process {ranks[1].process.pid}) was lost while the ranks met"
    assert dead in ended.err
    assert ended.seconds < 40


@processes
def test_a_rank_is_told_why_another_one_failed(tmp_path: Path, port: str) -> None:
    ranks = [Rank(tmp_path, "0", by_hand(0, 2, port), fail="raise")]
    ended = every([*ranks, Rank(tmp_path, "1", by_hand(1, 2, port))])
    assert [rank.code for rank in ended] == [70, 7]
    assert ended[0].err == "dtt: error: the disk is full; free some space\n"
    told = f"rank 0 on {HERE} failed: the disk is full; free some space"
    assert ended[1].err.startswith(f"dtt: error: {told}")


@processes
def test_a_rank_that_does_not_come_back_is_ended(tmp_path: Path, port: str) -> None:
    """One that hangs, as in a collective of NCCL, when another one has failed."""
    ranks = [Rank(tmp_path, "0", by_hand(0, 2, port), fail="raise")]
    ended = every([*ranks, Rank(tmp_path, "1", by_hand(1, 2, port), fail="hang")])
    assert [rank.code for rank in ended] == [70, 7]
    assert f"dtt: error: rank 0 on {HERE} failed: the disk is full" in ended[1].err


@processes
def test_a_rank_that_is_killed_is_a_loss(tmp_path: Path, port: str) -> None:
    ranks = [Rank(tmp_path, "1", by_hand(1, 2, port), fail="kill")]
    ended = every([*ranks, Rank(tmp_path, "0", by_hand(0, 2, port))])
    assert [rank.code for rank in ended] == [-signal.SIGKILL, 7]
    assert (
        ended[1].err
        == "dtt: error: another rank was lost; see its messages; the same command goes on\n"
    )


@processes
def test_the_loss_of_rank_0_is_noticed_by_a_rank_that_does_not_come_back(
    tmp_path: Path, port: str
) -> None:
    """Its store went with it, so that it leaves no reason."""
    ranks = [Rank(tmp_path, "0", by_hand(0, 2, port), fail="kill")]
    ended = every([*ranks, Rank(tmp_path, "1", by_hand(1, 2, port), fail="hang")])
    assert [rank.code for rank in ended] == [-signal.SIGKILL, 7]
    assert ended[1].err == f"dtt: error: rank 0 on {HERE} was lost; the same command goes on\n"


@processes
@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_hear_of_a_rank_that_a_signal_stops(
    tmp_path: Path, port: str, rank: int
) -> None:
    fails = ["hang", "hang"]
    fails[rank] = "stop"
    ended = every([Rank(tmp_path, str(r), by_hand(r, 2, port), fail=fails[r]) for r in (0, 1)])
    assert (ended[rank].code, ended[1 - rank].code) == (75, 7)
    assert f"rank {rank} on {HERE} failed: it was stopped by a signal" in ended[1 - rank].err


# --- hosts ---------------------------------------------------------------------------------------


class Host:
    """Rank 0 of a meeting of ranks that are, by their cards, on a host each."""

    def __init__(self, ranks: int, seconds: float) -> None:
        cards = tuple(Card(r, ranks, home=f"home{r}", address="127.0.0.1") for r in range(ranks))
        point = Point("127.0.0.1", 29500, "here")
        self.meeting = meet._Meeting(Place(ranks=ranks), point, cards[0], Clock(seconds))
        room = Room(HashStore(), "token", cards[0], serves=False, quiet=False)
        self.met = meet.Met(room, cards)

    def prove(self) -> None:
        self.meeting._prove_links(self.met)


def test_time_goes_on_with_every_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else rank 0 would count as silent where there are many hosts."""
    host, seen = Host(5, 0.0), []

    def reach(*words: object) -> None:
        seen.append(host.meeting.clock.paused)
        time.sleep(0.01)

    monkeypatch.setattr(meet.network, "reach", reach)
    host.met.room.store.add("linked", 4)
    host.prove()
    assert len(seen) == 4 and seen == sorted(set(seen))
    assert host.meeting.clock.paused > seen[-1]


def test_ranks_that_do_not_reach_all_hosts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(4, 0.0)
    monkeypatch.setattr(meet.network, "reach", lambda *words: None)
    monkeypatch.setattr(meet, "CONNECTING", 0.02)
    host.met.room.store.set("linked/2", "1")
    host.met.room.store.add("linked", 1)
    with pytest.raises(PeerError, match=r"ranks 1, 3 of 4 did not reach all hosts within 0 s"):
        host.prove()


# --- torchrun ------------------------------------------------------------------------------------


@processes
def test_a_room_that_ended_before_a_restart_is_left_alone(tmp_path: Path, port: str) -> None:
    """torchrun's agent keeps one store, and a rank may come to it before the new rank 0."""
    more = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "7"}
    environ = [by_hand(r, 2, port, MASTER_ADDR="127.0.0.1", **more) for r in (0, 1)]
    store = TCPStore("127.0.0.1", int(port), is_master=True, wait_for_workers=False)
    chair = Card(0, 2, launch_name(find_place(environ[0]), environ[0], ()))
    room = Room(store, "before", chair, serves=False, quiet=False)
    assert room.enter()
    room.leave_reason(PeerError("rank 0 was stopped while the ranks met", "start again"))
    store.set(meet.ROUND, json.dumps({"token": "before", "card": asdict(chair)}))
    first = Rank(tmp_path, "1", environ[1])
    first.said("waiting for rank 0 of 2")
    ended = every([first, Rank(tmp_path, "0", environ[0])])
    assert [rank.code for rank in ended] == [0, 0], ended


WORKER = """
import os, signal, sys, torch
from dtt import dist
runtime = dist.start(dist.find_place(os.environ), "cpu", 1)
again = os.environ["TORCHELASTIC_RESTART_COUNT"]
if again == "0" and runtime.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
total = runtime.sum(torch.ones(1))
print(f"rank {runtime.rank} met {total.item():.0f} after {again} restarts", flush=True)
runtime.close()
dist.leave(0)
"""


@processes
@pytest.mark.parametrize("own_store", ["0", "1"])
def test_a_restart_by_torchrun(tmp_path: Path, own_store: str) -> None:
    """Whether or not its agent keeps one store: torch alone recovers only if it does not."""
    (tmp_path / "worker.py").write_text(WORKER)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *words, "--max-restarts=1", str(tmp_path / "worker.py")],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": own_store},
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"rank {rank} met 2 after 1 restarts" in done.stdout
