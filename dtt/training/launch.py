"""Training as one rank: this process alone, or one of those that a launcher started."""

from __future__ import annotations

import hashlib
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtt.config.load import named
from dtt.config.schema import Config
from dtt.dist import find_place, start
from dtt.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    ConfigError,
    DataError,
    LostRankError,
    RankError,
)
from dtt.huggingface.origin import with_origin
from dtt.reporting import report_error
from dtt.training.batching import require_layout
from dtt.training.engine import fit
from dtt.training.loop import closing_lines
from dtt.training.picture import draw_loss, sparkline
from dtt.training.preemption import exit_on_preemption
from dtt.training.refusals import require_plan
from dtt.training.run import open_run


@dataclass(frozen=True)
class Trained:
    """What `train` returns."""

    folder: Path
    step: int
    complete: bool
    """False when a signal stopped the run; the same call goes on."""
    best_loss: float | None


@exit_on_preemption()
def train(config: Config, *, resume: str | Path | None = None, fresh: bool = False) -> Trained:
    """Train as this process's rank (alone, or as torchrun, Slurm or MPI placed it).

    Continues the run of this name if there is one. Raises the errors of dtt.errors.
    """
    config, place = with_origin(named(config), fresh), find_place(os.environ)
    if place.launcher == "none" and config.parallel.world_size > 1:
        raise ConfigError(
            f"parallel.world_size is {config.parallel.world_size}, but this is one process",
            "start workers with `dtt train` or torchrun",
        )
    require_layout(config, place.ranks)
    require_plan(config, place.ranks)
    runtime = start(
        place,
        config.training.device,
        config.training.threads,
        {"configuration": hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12]},
        config.parallel.rendezvous_timeout,
    )
    begun = time.perf_counter()
    taken = str(resume) if resume else None
    with runtime.sharing_failures(), open_run(config, runtime, taken, fresh) as run:
        if run.is_complete():
            run.reporter.info(f"{run.folder} is already complete: {run.state.step} steps")
        else:
            fit(run)
            if runtime.is_main and run.is_complete():
                run.show_picture(draw_loss(run.folder, run.reporter.warning))
                run.reporter.info(sparkline(run.folder))
            for line in closing_lines(run, time.perf_counter() - begun):
                run.reporter.info(line)
        trained = Trained(run.folder, run.state.step, run.is_complete(), run.state.best_loss)
    runtime.close()
    return trained


def train_rank(
    config: Config, resume: str | Path | None, fresh: bool, speaks: bool, spoken: Any = None
) -> int:
    """Train as one of several ranks and return the exit code; errors become a line on stderr.

    What ends all ranks alike is said once: by the rank that `speaks`, or, where the ranks of a
    machine share the flag `spoken` (a multiprocessing Value), by the first of them that fails.
    """
    try:
        return EXIT_DONE if train(config, resume=resume, fresh=fresh).complete else EXIT_PREEMPTED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemExit as stop:
        return int(stop.code or 0)
    except Exception as error:
        if config.logging.level == "debug":
            traceback.print_exc()
        if isinstance(error, LostRankError):
            return report_error("dtt train", error, quiet=spoken is not None)
        alike = isinstance(error, ConfigError | DataError) and not isinstance(error, RankError)
        unheard = alike and not speaks
        if spoken is None:
            return report_error("dtt train", error, quiet=unheard)
        with spoken.get_lock():
            code = report_error("dtt train", error, quiet=unheard or bool(spoken.value))
            spoken.value = 1
        return code
