"""What a cleaning step is: a pure function of a document's text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dtt.errors import DataError


@dataclass(frozen=True)
class Dropped:
    """A document that a step leaves out, and why, in words that are counted."""

    reason: str


Rule = Callable[[str], "str | Dropped"]
"""Returns the text, changed or not, or that it is left out; equal texts get equal answers."""


def missing_package(package: str, step: str) -> DataError:
    """The error for a step whose library is not installed."""
    return DataError(
        f"data.cleaning: the step {step} needs the Python package {package}",
        'pip install "dtt[data]"',
    )
