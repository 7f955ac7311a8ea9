"""This host's network, and why another host cannot be reached: for messages that say it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path

from dtt.machine import bounded

SIOCGIFADDR = 0x8915
"""Linux: ask for the IPv4 address of an interface (netdevice(7))."""
LOOPBACK = {"linux": "lo", "darwin": "lo0"}
LISTEN = "0A"
"""The state of a listening socket in /proc/net/tcp (include/net/tcp_states.h)."""


def interfaces() -> dict[str, list[str]]:
    """Return the addresses of each of this host's interfaces, IPv4 first; {} where unknown.

    Without those that hold on one link only (IPv6's fe80::).
    """
    if sys.platform != "linux":
        return {}
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        import fcntl

        for name, addresses in found.items():
            with contextlib.suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(asker.fileno(), SIOCGIFADDR, request)
                addresses.append(socket.inet_ntoa(answer[20:24]))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            digits, _, _, _, _, name = line.split()
            address = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
            if not address.startswith("fe80:"):
                found.setdefault(name, []).append(address)
    return found


def shown_interfaces() -> str:
    """Return this host's interfaces with their first addresses, for people."""
    known = [f"{name} {found[0]}" for name, found in interfaces().items() if found]
    return ", ".join(known) or "unknown"


def interface_of(address: str) -> str:
    """Return the name of the interface that has `address`; empty if none has."""
    return next((name for name, found in interfaces().items() if address in found), "")


def is_own(address: str) -> bool:
    """Return whether a socket of this host can have that numeric address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def is_loopback(address: str) -> bool:
    """Return whether a numeric address means the host itself, as Debian's 127.0.1.1 does."""
    return address.startswith(("127.", "::ffff:127.")) or address == "::1"


def source_address(towards: str) -> str:
    """Return the address from which this host would talk to a numeric address; empty: no route."""
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))
        except OSError:
            return ""
        return plain(probe.getsockname()[0])


def plain(address: str) -> str:
    """Return an IPv4 address that a dual socket shows as ::ffff:10.0.0.1 in its own form."""
    return address.removeprefix("::ffff:")


def resolve(host: str, port: int, seconds: float) -> list[str]:
    """Return the numeric addresses of a name; gaierror if it has none, or not in that time."""
    try:
        found = bounded(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), seconds)
    except TimeoutError:
        silent = "the name service does not answer"
        raise socket.gaierror(socket.EAI_AGAIN, silent) from None
    return list(dict.fromkeys(plain(str(entry[4][0])) for entry in found))


def reach(host: str, port: int, seconds: float, greeting: bytes = b"") -> tuple[str, str, bytes]:
    """Connect once and close; return (address of this end, of the other, answer), or raise OSError.

    The answer is what comes first after a `greeting`, if any does.
    """
    error: OSError = socket.gaierror(socket.EAI_NONAME, "no address")
    for address in resolve(host, port, seconds):
        try:
            with socket.create_connection((address, port), seconds) as link:
                answer = b""
                if greeting:
                    link.settimeout(min(1.0, seconds))
                    with contextlib.suppress(OSError):
                        link.sendall(greeting)
                        answer = link.recv(64)
                return plain(link.getsockname()[0]), plain(link.getpeername()[0]), answer
        except OSError as refused:
            error = refused
    raise error


def listen(port: int, address: str = "") -> socket.socket:
    """Listen at `port` (0: any that is free) of all addresses, or of one; OSError if taken."""
    if address:
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET]
    else:
        families = [socket.AF_INET6, socket.AF_INET]
    for family in families:
        listener = None
        try:
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6 and not address:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind((address, port))
            listener.listen(1024)
            return listener
        except OSError as error:
            if listener is not None:
                listener.close()
            if error.errno == errno.EADDRINUSE or family == families[-1]:
                raise  # anything else at the first of two: a host without IPv6
    raise AssertionError


def holder(port: int) -> str:
    """Return who listens at a port of this host, as `python (process 71)`; empty if unknown.

    Known only of the same user's processes, or to root.
    """
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                words = line.split()
                if words[3] == LISTEN and int(words[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{words[9]}]")
    for folder in Path("/proc").glob("[0-9]*/fd") if inodes else ():
        with contextlib.suppress(OSError):
            if any(os.readlink(file) in inodes for file in folder.iterdir()):
                name = (folder.parent / "comm").read_text(encoding="utf-8").strip()
                return f"{name} (process {folder.parent.name})"
    return ""


def named_interfaces(variable: str, value: str) -> list[str]:
    """Return this host's interfaces that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME mean by `value`.

    Gloo's are names; NCCL's are prefixes, names after `=`, or those to leave out after `^`.
    """
    names, known = [part for part in re.split(r"[,\s]+", value) if part], list(interfaces())
    if not variable.startswith("NCCL"):
        return names if set(names) <= set(known) else []  # gloo wants all of them
    exact, out = value.lstrip("^").startswith("="), value.startswith("^")
    wanted = [name.lstrip("^=") for name in names]

    def is_meant(name: str) -> bool:
        return any(name == each if exact else name.startswith(each) for each in wanted)

    return [name for name in known if is_meant(name) != out and name not in LOOPBACK.values()]


@cache
def slurm_address(node: str) -> str:
    """Return the address that Slurm has for a node whose name does not resolve; else the name.

    Slurm is asked once: many ranks wait for one controller.
    """
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        words = ["scontrol", "show", "node", "--oneliner", node]
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
        if found := re.search(r"\bNodeAddr=(\S+)", done.stdout):
            return found[1]
    return node


def explain(error: OSError, host: str, port: int) -> tuple[str, str]:
    """Say why `host`:`port` cannot be reached from here, and how to mend it."""
    here, where = socket.gethostname(), f"{host}:{port}"
    if isinstance(error, socket.gaierror):
        return (
            f"{here} cannot resolve {host} ({(error.strerror or 'no address').lower()})",
            "set MASTER_ADDR to an address that every node knows, such as the IP address of rank "
            "0's host, or add the name to /etc/hosts",
        )
    if error.errno == errno.ECONNREFUSED:
        with contextlib.suppress(OSError):
            if all(is_loopback(each) for each in resolve(host, port, 5)):
                return (
                    f"nobody listens at {where}, which on {here} is {here} itself",
                    "start rank 0 here, or set MASTER_ADDR to an address of rank 0's host that the "
                    "other nodes know (not one of 127.*, which Debian's /etc/hosts gives a host)",
                )
        return (
            f"{here} reaches {host}, but nobody listens at its port {port}",
            "start rank 0 there; MASTER_ADDR must be its host, and MASTER_PORT the same everywhere",
        )
    if isinstance(error, TimeoutError) or error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        said = "no answer" if isinstance(error, TimeoutError) else (error.strerror or "").lower()
        return (
            f"{here} cannot reach {where} ({said}): a firewall, a host that is down, or an "
            f"address of a network that {here} is not in",
            "open all ports between the nodes, or set MASTER_ADDR to rank 0's address in a network "
            f"that all share; {here} has {shown_interfaces()}",
        )
    return f"{here} cannot reach {where} ({error.strerror or error})", "check network and firewall"
