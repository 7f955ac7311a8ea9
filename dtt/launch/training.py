"""From a configuration to ranks: this process, one of a launcher's, or workers of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dtt.config.load import named
from dtt.config.schema import Config
from dtt.data.corpora import prepare_corpora
from dtt.data.progress import progress
from dtt.dist import find_place, leave
from dtt.errors import EXIT_DONE, EXIT_PREEMPTED
from dtt.training.batching import require_layout
from dtt.training.engine import require_engine
from dtt.training.launch import train, train_rank
from dtt.training.refusals import require_plan


def launch_training(config: Config, *, resume: str | Path | None, fresh: bool) -> int:
    """Train, with as many workers as the configuration asks for, and return the exit code."""
    config, place = named(config), find_place(os.environ)
    if place.launcher == "none" and config.parallel.world_size > 1:
        return _on_workers(config, resume, fresh)
    if place.ranks > 1:
        leave(train_rank(config, resume, fresh, place.rank == 0))
    return EXIT_DONE if train(config, resume=resume, fresh=fresh).complete else EXIT_PREEMPTED


def _on_workers(config: Config, resume: str | Path | None, fresh: bool) -> int:
    """Start the workers on this machine, on a corpus that is ready."""
    require_layout(config, config.parallel.world_size)
    require_plan(config, config.parallel.world_size)
    require_engine(config.training)
    with progress() as advance:  # not while ranks wait for each other, which has a time limit
        prepare_corpora(config.data, config.tokenizer, report=_warn, advance=advance)
    # What starts workers is imported where they are.
    from dtt.launch.elastic_launch import train_here
    from dtt.launch.elastic_worker import Task

    return train_here(Task(config, resume, fresh))


def _warn(text: str) -> None:
    print(f"dtt train: warning: {text}", file=sys.stderr, flush=True)
