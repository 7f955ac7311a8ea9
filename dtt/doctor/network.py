"""The network as this machine sees it: its name, its interfaces, the port where ranks meet."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dtt.doctor.bench import soon
from dtt.doctor.finding import Finding, Subject, failed, ok, skipped, warning

PORT = 29500
"""Where ranks meet unless MASTER_PORT says otherwise."""
SIOCGIFADDR = 0x8915
NAMING = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Variables that name interfaces: whole names for gloo; prefixes for NCCL (^ excludes, = whole)."""


def check_host_name(subject: Subject) -> Iterator[Finding]:
    name = socket.gethostname()
    several = subject.place.ranks > subject.place.local_ranks
    yield judge_host_name(name, soon(resolve, name, seconds=10), several)


def resolve(name: str) -> list[str]:
    """Return the IPv4 addresses of a name; none where it cannot be resolved."""
    try:
        rows = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(row[4][0]) for row in rows))


def judge_host_name(name: str, addresses: list[str], several: bool) -> Finding:
    """Judge what this machine's name means to itself; `several`: the run has other machines."""
    figures = {"host": name, "addresses": addresses}
    local = [address for address in addresses if address.startswith("127.")]
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
    yield judge_interfaces(interfaces(), os.environ)


def interfaces() -> dict[str, str]:
    """Return the IPv4 address of each interface by name; empty where it has none."""
    found = {}
    for _, name in socket.if_nameindex():
        found[name] = _address(name)
    return found


def _address(name: str) -> str:
    if sys.platform != "linux":
        return "unknown"
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = array.array("B", struct.pack("256s", name.encode()[:15]))
        try:
            fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request, True)
        except OSError:
            return ""
    return socket.inet_ntoa(request.tobytes()[20:24])


def judge_interfaces(found: Mapping[str, str], environ: Mapping[str, str]) -> Finding:
    """Judge the interfaces, and those that variables name for gloo and NCCL."""
    there = {name: address for name, address in found.items() if address}
    shown = ", ".join(f"{name} {address}" for name, address in there.items()) or "none"
    figures: dict[str, Any] = {"interfaces": dict(found)}
    for variable in NAMING:
        asked = environ.get(variable, "")
        if not asked:
            continue
        shown += f"; {variable}={asked}"
        figures |= {variable: asked}
        if not _matches(variable, asked, list(there)):
            others = [name for name in there if name != "lo"] or list(there)
            return failed(
                f"{shown} is no interface with an address",
                f"export {variable}={others[0] if others else 'NAME'} on this machine, or unset it",
                figures,
            )
    return ok(shown, figures)


def _matches(variable: str, asked: str, names: list[str]) -> bool:
    wanted = asked.lstrip("^=").split(",")
    if variable.startswith("GLOO"):
        return all(name in names for name in wanted)
    if asked.startswith("^"):
        return any(not name.startswith(tuple(wanted)) for name in names)
    whole = asked.startswith("=")
    return any(name in wanted if whole else name.startswith(tuple(wanted)) for name in names)


def check_port(subject: Subject) -> Iterator[Finding]:
    asked = os.environ.get("MASTER_PORT", "")
    if subject.place.launcher != "none" and subject.place.ranks > 1:
        yield skipped(f"{asked or PORT}: the ranks of this launch meet there")
        return
    if asked and not (asked.isdecimal() and int(asked) < 1 << 16):
        yield failed(f"MASTER_PORT={asked} is no port", "export MASTER_PORT=29500, or unset it")
        return
    port = int(asked or PORT)
    yield judge_port(port, listen(port), bool(asked))


def listen(port: int) -> str:
    """Return why this process cannot listen on a port; empty: it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError as error:
            return os.strerror(error.errno or errno.EIO).lower()
    return ""


def judge_port(port: int, reason: str, asked: bool) -> Finding:
    """Judge the port where ranks meet; `asked`: MASTER_PORT names it."""
    if not reason:
        return ok(f"{port} is free", {"port": port, "free": True})
    where = "in the environment or with --master-port"
    found = failed if asked else warning
    return found(
        f"{port}: {reason}",
        f"set MASTER_PORT to a free port, the same on all machines, {where} "
        "(`dtt train --world-size N` finds one by itself)",
        {"port": port, "free": False},
    )


def check_loopback(subject: Subject) -> Iterator[Finding]:
    yield soon(judge_loopback, seconds=10)


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


def route_speed(address: str) -> tuple[str, float]:
    """Return the interface by which an address is reached, and its speed in GB/s (0: not known)."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        own = probe.getsockname()[0]
        name = next((n for n, a in interfaces().items() if a == own), "")
        text = Path(f"/sys/class/net/{name}/speed").read_text(encoding="ascii")
        return name, max(0, int(text)) / 8000
    return "", 0.0
