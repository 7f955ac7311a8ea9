"""Hosts as a command line names them."""

from __future__ import annotations

import argparse
import re

from dtt.errors import ConfigError
from dtt.launch.job import Job

# A name that begins with a hyphen would be an option of ssh or mpirun.
HOST = re.compile(r"(?:[A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9_][\w.-]*")


def add_hosts(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --hosts."""
    parser.add_argument("--hosts", type=host_list, metavar="A,B,...", help=what)


def host_list(text: str) -> tuple[str, ...]:
    """Return the hosts of a comma-separated list; the argparse type of --hosts."""
    hosts = tuple(part.strip() for part in text.split(",") if part.strip())
    wrong = next((host for host in hosts if not HOST.fullmatch(host)), None)
    if wrong is not None or not hosts:
        got = repr(text if wrong is None else wrong)
        raise argparse.ArgumentTypeError(f"should be hosts with commas between them, got {got}")
    twice = next((host for host in hosts if hosts.count(host) > 1), None)
    if twice is not None:
        raise argparse.ArgumentTypeError(f"{twice} is there twice")
    return hosts


def matching(job: Job, hosts: tuple[str, ...]) -> tuple[str, ...]:
    """Return `hosts`; ConfigError unless they are as many as the job has nodes."""
    if len(hosts) != job.nodes:
        raise ConfigError(
            f"--nodes {job.nodes}, and --hosts names {len(hosts)} ({', '.join(hosts)})",
            "leave out --nodes: it is the number of hosts",
        )
    return hosts


def address(host: str) -> str:
    """Return a host without its user."""
    return host.rpartition("@")[2]
