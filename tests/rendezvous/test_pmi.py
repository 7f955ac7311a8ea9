"""The conversation with mpirun, against a server of its protocol; test_mpi.py has the real ones."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest

from dtt.errors import PeerError
from dtt.rendezvous.pmi import share

Answer = Callable[[str], str]


def mpirun(answer: Answer) -> socket.socket:
    """A socket whose other end answers each line."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs, theirs.makefile("rw") as lines:
            for line in lines:
                reply = answer(line.strip())
                if not reply:
                    return
                lines.write(reply + "\n")
                lines.flush()

    threading.Thread(target=serve, daemon=True).start()
    return ours


def test_a_rank_learns_the_name_and_the_value() -> None:
    asked: list[str] = []
    stored: dict[str, str] = {}

    def answer(line: str) -> str:
        asked.append(line)
        words = dict(word.split("=", 1) for word in line.split())
        if words["cmd"] == "put":
            stored[words["key"]] = words["value"]
        return {
            "init": "cmd=response_to_init rc=0 pmi_version=1 pmi_subversion=1",
            "get_my_kvsname": "cmd=my_kvsname rc=0 kvsname=kvs_7",
            "put": "cmd=put_result rc=0",
            "barrier_in": "cmd=barrier_out tag=0",
            "get": f"cmd=get_result rc=0 value={stored.get('dtt')}",
            "finalize": "cmd=finalize_ack rc=0",
        }[words["cmd"]]

    with mpirun(answer) as link:
        assert share(link.fileno(), "10.0.0.1:7000", 10) == ("kvs_7", "10.0.0.1:7000")
    assert [line.split()[0] for line in asked] == [
        f"cmd={name}" for name in ("init", "get_my_kvsname", "put", "barrier_in", "get", "finalize")
    ]


@pytest.mark.parametrize(
    "answer",
    [
        lambda line: "",  # it ends the connection
        lambda line: "cmd=response_to_init rc=-1",
        lambda line: "cmd=whatever rc=0",
    ],
    ids=["closed", "refused", "strange"],
)
def test_an_mpirun_that_does_not_say_it(answer: Answer) -> None:
    with mpirun(answer) as link, pytest.raises(PeerError, match="did not say where rank 0") as no:
        share(link.fileno(), "", 10)
    assert "MASTER_ADDR" in no.value.fix


def test_a_barrier_that_others_do_not_come_to() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(PeerError, match="within 0 s"):
        share(ours.fileno(), "", 0.1)
