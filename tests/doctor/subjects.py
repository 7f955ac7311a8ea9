"""Subjects to examine, with a configuration of their own and nothing of this environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtt.config.load import load_config
from dtt.doctor.bench import Bench
from dtt.doctor.finding import Subject
from dtt.place import Place

BENCH = Bench()


def subject(
    settings: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    **others: Any,
) -> Subject:
    """A machine with one rank, for a run of these settings."""
    config = load_config(overrides={k: (f"--{k}", v) for k, v in (settings or {}).items()})
    return Subject(config, others.pop("place", Place()), environ or {}, BENCH, **others)
