"""`transformers` without its notes: what a person must know, dtt says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Keep bars and notes of `transformers` off the terminal."""
    from transformers.utils import logging as transformers_logging

    theirs: Any = transformers_logging
    level, log = theirs.get_verbosity(), logging.getLogger("transformers")
    bars = theirs.is_progress_bar_enabled()
    before = log.propagate
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        log.propagate = before
        if bars:
            theirs.enable_progress_bar()
