"""The Hugging Face Hub: whether it answers, or is not to be asked, and what is here already."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from dtt.data.remote.fetch import is_offline
from dtt.doctor.finding import Finding, Subject, ok, skipped, warning
from dtt.machine import bounded

HUB = "https://huggingface.co"
PATIENCE = 3.0
"""Seconds that the Hub has to answer."""
MEND = (
    "check the network and HTTPS_PROXY, or name a mirror with HF_ENDPOINT; without the Hub, "
    "download elsewhere (`dtt download`) and copy the data folder"
)


def check_hub(subject: Subject) -> Iterator[Finding]:
    offline = is_offline(subject.environ)
    address = subject.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB
    reason = "" if offline else _ask(address)
    subject.hub_answers = not offline and not reason
    yield judge_hub(address, offline, reason, cached(subject.environ))


def _ask(address: str) -> str:
    try:
        return bounded(lambda: ask(address), 2 * PATIENCE + 4)
    except OSError as error:  # it took too long, which a name server can
        return error.strerror or str(error)


def ask(address: str) -> str:
    """Return why an address does not answer; empty: it does, whatever it says."""
    try:
        request = urllib.request.Request(f"{address}/api/models?limit=1", method="HEAD")
        urllib.request.urlopen(request, timeout=PATIENCE).close()
    except urllib.error.HTTPError as error:
        return "" if error.code < 500 else f"HTTP status {error.code}"
    except urllib.error.URLError as error:
        return str(getattr(error.reason, "strerror", None) or error.reason).lower()
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__
    return ""


def cached(environ: Mapping[str, str]) -> tuple[Path, int]:
    """Return the Hub's cache, and how many repositories are in it."""
    home = Path(environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    folder = Path(environ.get("HF_HUB_CACHE") or home / "hub")
    try:
        return folder, sum(
            path.name.startswith(("datasets--", "models--")) for path in folder.iterdir()
        )
    except OSError:
        return folder, 0


def judge_hub(address: str, offline: bool, reason: str, cache: tuple[Path, int]) -> Finding:
    """Judge the Hub: never more than a warning, since most runs do not need it."""
    folder, number = cache
    have = f"{number} repositories in {folder}" if number else "nothing in its cache"
    figures = {"address": address, "offline": offline, "reachable": not offline and not reason}
    if offline:
        return skipped(f"HF_HUB_OFFLINE is set, {address} is not asked; {have}")
    if reason:
        return warning(f"{address}: {reason}; {have}", MEND, figures)
    return ok(f"{address} answers; {have}", figures)
