"""The key-value space of an mpirun of MPICH's family (Hydra, Intel MPI), without an MPI library.

Hydra tells no rank where another one is, and does not name its launches in the environment. Its
wire protocol does both (PMI-1: lines of `cmd=NAME key=value` over the socket PMI_FD; Balaji et al.
2010, "PMI: A Scalable Parallel Process-Management Interface").
"""

from __future__ import annotations

import os
import socket

from dtt.errors import PeerError

LONGEST = 4096


def share(descriptor: int, value: str, seconds: float) -> tuple[str, str]:
    """Return (name of the launch, rank 0's value) on every rank; only rank 0 gives a value.

    All ranks have to call it, once in a process. PeerError if the others do not within `seconds`.
    """
    try:
        with socket.socket(fileno=os.dup(descriptor)) as link:
            link.settimeout(seconds)
            _ask(link, "init pmi_version=1 pmi_subversion=1")
            space = _ask(link, "get_my_kvsname")["kvsname"]
            if value:
                _ask(link, f"put kvsname={space} key=dtt value={value}")
            _ask(link, "barrier_in")
            found = _ask(link, f"get kvsname={space} key=dtt")["value"]
            _ask(link, "finalize")
            return space, found
    except (OSError, KeyError, ValueError) as error:
        raise PeerError(
            f"mpirun did not say where rank 0 is within {seconds:.0f} s ({error!r})",
            "set MASTER_ADDR to the first host and MASTER_PORT to a free port of it",
        ) from None


def _ask(link: socket.socket, command: str) -> dict[str, str]:
    link.sendall(f"cmd={command}\n".encode())
    answer = b""
    while not answer.endswith(b"\n"):
        more = link.recv(LONGEST)
        if not more or len(answer) > LONGEST:
            raise ValueError(f"no answer to {command.split()[0]}")
        answer += more
    found = dict(word.partition("=")[::2] for word in answer.decode().split())
    if found.get("rc", "0") != "0":
        raise ValueError(answer.decode().strip())
    return found
