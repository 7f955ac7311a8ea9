"""The network as this machine sees it: its name, its interfaces, the port where ranks meet."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dtt import network
from dtt.doctor.finding import Finding, Subject, failed, ok, skipped, warning
from dtt.machine import bounded
from dtt.place import find_point

PATIENCE = 10.0
"""Seconds for a name to be resolved."""
NAMING = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Variables that name interfaces."""


def check_host_name(subject: Subject) -> Iterator[Finding]:
    name = socket.gethostname()
    try:
        addresses = network.resolve(name, 0, PATIENCE)
    except OSError:
        addresses = []
    several = subject.place.ranks > subject.place.local_ranks
    yield judge_host_name(name, addresses, several)


def judge_host_name(name: str, addresses: list[str], several: bool) -> Finding:
    """Judge what this machine's name means to itself; `several`: the run has other machines."""
    figures = {"host": name, "addresses": addresses}
    local = [address for address in addresses if network.is_loopback(address)]
    if not addresses:
        mend = f"add a line `ADDRESS {name}` to /etc/hosts, or the name to your DNS"
        found = failed if several else warning
        return found(f"{name} cannot be resolved", mend, figures)
    if not local:
        return ok(f"{name} is {', '.join(addresses)}", figures)
    if several:
        return warning(
            f"{name} is {local[0]} here, which other machines cannot reach",
            f"give {name} its address of the network in /etc/hosts, or name the interface with "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
            figures,
        )
    return ok(f"{name} is {local[0]} (enough for one machine)", figures)


def check_interfaces(subject: Subject) -> Iterator[Finding]:
    yield judge_interfaces(network.interfaces(), subject.environ)


def judge_interfaces(found: Mapping[str, list[str]], environ: Mapping[str, str]) -> Finding:
    """Judge this machine's interfaces, and those that variables name for gloo and NCCL."""
    there = {name: addresses[0] for name, addresses in found.items() if addresses}
    if not there:
        return skipped("this system does not say what interfaces it has")
    shown = ", ".join(f"{name} {address}" for name, address in there.items())
    figures: dict[str, Any] = {"interfaces": dict(found)}
    for variable in NAMING:
        asked = environ.get(variable, "")
        if not asked:
            continue
        shown += f"; {variable}={asked}"
        figures |= {variable: asked}
        if not any(name in there for name in network.named_interfaces(variable, asked)):
            others = [name for name in there if name != "lo"] or list(there)
            return failed(
                f"{shown} is no interface with an address",
                f"export {variable}={others[0]} on this machine, or unset it",
                figures,
            )
    return ok(shown, figures)


def check_port(subject: Subject) -> Iterator[Finding]:
    point = find_point(subject.place, subject.environ)
    if subject.place.ranks > 1:
        where = point.port or "one that rank 0 chooses"
        yield skipped(f"{where}: the ranks of this launch meet there")
        return
    try:
        network.listen(point.port).close()
    except OSError as error:
        why = os.strerror(error.errno or errno.EIO).lower()
        asked = bool(subject.environ.get("MASTER_PORT"))
        yield judge_port(point.port, why, network.holder(point.port), asked)
        return
    yield judge_port(point.port, "", "", False)


def judge_port(port: int, reason: str, holder: str, asked: bool) -> Finding:
    """Judge the port where ranks meet. `reason`: why it cannot be had; `asked`: it was chosen with
    MASTER_PORT."""
    figures = {"port": port, "free": not reason}
    if not reason:
        return ok(f"{port} is free", figures)
    return (failed if asked else warning)(
        f"{port}: {reason}{f', by {holder}' if holder else ''}",
        "set MASTER_PORT to a free port, the same on all machines "
        "(`dtt train --world-size N` finds one by itself)",
        figures,
    )


def check_loopback(subject: Subject) -> Iterator[Finding]:
    yield bounded(judge_loopback, PATIENCE)


def judge_loopback() -> Finding:
    """Connect to this machine itself."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()
            with socket.create_connection(address, 5) as end, listener.accept()[0] as other:
                end.sendall(b"dtt")
                said = other.recv(3)
    except OSError as error:
        return failed(
            f"127.0.0.1: {error.strerror or error}",
            "bring the loopback interface up (`ip link set lo up`), and let the firewall pass it",
        )
    if said != b"dtt":
        return failed("127.0.0.1 does not give back what was sent", "check the firewall's rules")
    return ok("127.0.0.1 connects")


def speed_of(interface: str) -> float:
    """Return the speed of an interface in GB/s; 0 where it is not known."""
    folder = Path("/sys/class/net") / interface
    if not any((folder / kind).exists() for kind in ("device", "bonding")):
        return 0.0  # a virtual one, whose figure means nothing
    try:
        return max(0, int((folder / "speed").read_text(encoding="ascii"))) / 8000
    except OSError:  # it is down
        return 0.0
