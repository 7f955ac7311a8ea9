"""From a configuration to a run: the one place below the command line that sees all of it."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from dtt import storage
from dtt.config.load import to_yaml
from dtt.config.model import Model
from dtt.config.schema import Config
from dtt.data.corpora import Corpora, open_corpora, prepare_corpora
from dtt.data.loader import Loader
from dtt.data.progress import progress
from dtt.dist import Runtime
from dtt.errors import ConfigError, DttError
from dtt.huggingface.origin import initial_weights
from dtt.metrics.background import Background
from dtt.metrics.flops import TokenFlops, flops_of, training_flops
from dtt.metrics.loggers import MetricsFile, Reporter, trim_lines
from dtt.metrics.meter import Cost, Meter
from dtt.metrics.peak import find_peak
from dtt.metrics.resources import require_resources, watch_machine
from dtt.metrics.trackers import (
    Opening,
    find_tracker,
    wanted,
    without_passwords,
)
from dtt.model.decoder import count_active_parameters, count_parameters
from dtt.model.language_model import LanguageModel
from dtt.optim.schedule import warmup_steps
from dtt.parallel.layout import Layout, resolve
from dtt.parallel.model import ParallelModel, Reader
from dtt.precision import choose_precision
from dtt.tokenizer import Tokenizer
from dtt.training.batching import require_layout
from dtt.training.build import build_model, build_stepper, load_optimizer
from dtt.training.checkpoint import Checkpoints
from dtt.training.engine import require_engine
from dtt.training.folder import (
    refuse_foreign_folder,
    remove_old_run,
    run_folder,
    write_run_files,
)
from dtt.training.load import check_weights, saved_config
from dtt.training.memory import memory_explained, remember_allocations
from dtt.training.profile import StepProfiler
from dtt.training.proof import Proof, build_whole
from dtt.training.refusals import refuse_documents, refuse_settings
from dtt.training.resume import refuse_other_run
from dtt.training.saved import Saved, open_checkpoint, read
from dtt.training.state import Run, TrainState, announce
from dtt.training.step import Stepper
from dtt.training.waiting import knows_waits, reducer_waits

DEFAULT_STEPS = 900


@contextmanager
def open_run(config: Config, runtime: Runtime, resume: str | None, fresh: bool) -> Iterator[Run]:
    """Build the run, or take it up where it was; on leaving, close files and locks.

    `resume` names another run's checkpoint to start from; it holds only until this run has a
    checkpoint of its own, so that the same command continues it. `fresh` removes the old run, once
    nothing can keep the new one from starting.
    """
    folder = run_folder(config)
    reporter = Reporter(None, config.logging.level)
    remember_allocations(config, runtime)
    if not runtime.is_main:
        with memory_explained(config, runtime, folder, "building"):
            run = _build(config, runtime, folder, reporter, resume, fresh)
        with memory_explained(config, runtime, folder, "training"):
            yield run
        return
    require_layout(config, runtime.ranks)  # refuse before anything is touched
    is_new = not folder.exists()
    with storage.RunLock(folder):
        reporter = Reporter(folder, config.logging.level)
        opened: Run | None = None
        failed = True
        try:
            refuse_foreign_folder(folder)
            with memory_explained(config, runtime, folder, "building"):
                opened = _build(config, runtime, folder, reporter, resume, fresh)
            with memory_explained(config, runtime, folder, "training"):
                yield opened
            failed = False
        except Exception as error:
            reporter.trace(traceback.format_exc())
            is_new &= isinstance(error, DttError)  # anything else has left its trace there
            raise
        finally:
            if opened is not None:
                opened.close(failed=failed)
            reporter.close()
            if is_new and opened is None:
                shutil.rmtree(folder, ignore_errors=True)


def _build(
    config: Config,
    runtime: Runtime,
    folder: Path,
    reporter: Reporter,
    resume: str | None,
    fresh: bool,
) -> Run:
    _require_packages(config)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        keep=config.checkpoint.keep,
        background=config.checkpoint.background,
        warn=reporter.warning,
        rank=runtime.rank,
        ranks=runtime.ranks,
    )
    corpora = _share_corpora(config, runtime, reporter)
    config = _resolve_vocabulary(config, corpora.tokenizer)
    layout = resolve(config.parallel, config.model, runtime.ranks)
    loader = _loader(config, corpora, runtime, layout)
    steps = _steps(config, loader)
    warmup_steps(config.schedule, steps)  # refuses a warm-up longer than the run
    dtype, why = choose_precision(config.training.precision, runtime.device)
    refuse_settings(config, runtime.device, layout, dtype)
    choose = partial(
        _share_checkpoint, config, runtime, corpora, checkpoints, resume, fresh, reporter
    )
    build = partial(_from_checkpoint, config, layout, loader, dtype, runtime, reporter)
    whole, stepper, state = build_whole(choose, build, checkpoints.judge, runtime)
    is_over = state.is_complete(steps) and config.training.engine == "dtt"  # a Trainer may go back
    shows, left = runtime.is_main and not is_over, steps - state.step
    if runtime.is_main:
        reporter.total(steps)
    run = Run(
        config=config,
        folder=folder,
        runtime=runtime,
        corpora=corpora,
        parameters=whole.parameters,
        parameter_names=whole.names,
        stepper=stepper,
        loader=loader,
        steps=steps,
        state=state,
        checkpoints=checkpoints,
        reporter=reporter,
        metrics=_metrics(config, corpora, runtime, folder, state.step, fresh),
        trackers=_trackers(config, folder, reporter, state.step) if shows else [],
        profiler=_profiler(config, runtime, folder, reporter, left) if shows else None,
        meter=_meter(whole.flops, stepper.model, dtype, steps, shows),
        resources=watch_machine() if shows and config.logging.resources else None,
        begun_at=state.step,
        again="the same command" + " without --fresh" * fresh,
    )
    announce(run, f"{dtype} ({why})")
    return run


class Undivided(NamedTuple):
    """What a model is before ranks divide it."""

    parameters: tuple[int, int]
    """All, and those that a token passes."""
    names: list[str]
    flops: TokenFlops


def _from_checkpoint(
    config: Config,
    layout: Layout,
    loader: Loader,
    dtype: torch.dtype,
    runtime: Runtime,
    reporter: Reporter,
    proof: Proof | None,
) -> tuple[Undivided, Stepper, TrainState]:
    """Return what the whole model is, what trains it, and where it is."""
    model = build_model(config, dtype)
    counts = count_parameters(model), count_active_parameters(model)
    names = [name for name, _ in model.named_parameters()]
    whole = Undivided(counts, names, _flops(config, model))  # before ranks divide it
    weights = _weights(config, model, runtime, proof, reporter)
    stepper = build_stepper(model, layout, config, runtime, dtype, weights)
    refuse_documents(model, loader)
    return whole, stepper, _restore(proof, stepper)


def _weights(
    config: Config, model: LanguageModel, runtime: Runtime, proof: Proof | None, reporter: Reporter
) -> Reader | None:
    """Return the checkpoint's weights, else those of init_from; None: the run makes its own."""
    if proof is not None:
        found = proof.group("model")
        check_weights(model, found.shapes(), proof.saved.path)
        return found
    if config.init_from is not None:
        return initial_weights(config, model, runtime, reporter.info)
    return None


def _metrics(
    config: Config, corpora: Corpora, runtime: Runtime, folder: Path, step: int, fresh: bool
) -> MetricsFile | None:
    """Put the run's files in place and open the metrics, on the rank that writes files."""
    if not runtime.is_main:
        return None
    if fresh:
        remove_old_run(folder)
    write_run_files(config, corpora.tokenizer, folder)
    trim_lines(folder / "samples.jsonl", step)
    return MetricsFile(folder / "metrics.jsonl", step)


def _require_packages(config: Config) -> None:
    """Raise ConfigError for a missing package before anything of an old run is removed."""
    for name in wanted(config.logging):
        find_tracker(name)
    if config.logging.resources:
        require_resources()
    require_engine(config.training)


def _trackers(config: Config, folder: Path, reporter: Reporter, step: int) -> list[Background]:
    """Open what shows curves, each in a thread of its own."""
    shown = without_passwords(config.model_dump(mode="json"))
    text = without_passwords(to_yaml(config))

    def opened(name: str) -> Background:
        make = find_tracker(name)
        return Background(
            name,
            lambda say, warn: make(Opening(folder, shown, text, step, say, warn)),
            info=reporter.info,
            warn=reporter.warning,
        )

    return [opened(name) for name in wanted(config.logging)]


def _meter(
    flops: TokenFlops, model: ParallelModel, dtype: torch.dtype, steps: int, shows: bool
) -> Meter:
    """Return the meter; one that shows figures knows the peak of the device, which all have."""
    runtime = model.mesh.runtime
    waits = knows_waits(model) if runtime.ranks > 1 else None
    event = partial(torch.cuda.Event, enable_timing=True) if runtime.device.type == "cuda" else None
    cost = None
    if shows:
        cost = Cost(flops.total, find_peak(runtime.device, dtype), runtime.ranks)
    return Meter(steps, cost, event=event, exchanged=reducer_waits(model), waits=waits)


def _flops(config: Config, model: LanguageModel) -> TokenFlops:
    if isinstance(config.model, Model):
        return training_flops(config.model)
    from dtt.model.hf.model import HfCausalModel  # transformers is for those who use it

    assert isinstance(model, HfCausalModel)
    return flops_of(*model.sizes_of_products(), config.model.layers, config.model.context)


def _profiler(
    config: Config, runtime: Runtime, folder: Path, reporter: Reporter, most: int
) -> StepProfiler | None:
    if not config.logging.profile:
        return None
    steps, cuda = config.logging.profile_steps, runtime.device.type == "cuda"
    return StepProfiler(folder, steps, most, reporter.info, cuda=cuda)


def _share_corpora(config: Config, runtime: Runtime, reporter: Reporter) -> Corpora:
    """Prepare the corpora on the main rank, and open them on the others."""

    def make() -> Corpora:
        with progress() as advance:
            made = prepare_corpora(
                config.data, config.tokenizer, report=reporter.warning, advance=advance
            )
            made.pack(config.model.context)  # once, not on every rank
            return made

    if runtime.ranks == 1:
        return make()
    folders = runtime.on_main(lambda: [p.corpus.folder.name for p in make().portions])
    return open_corpora(config.data, folders)


def _resolve_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    asked = config.model.vocab_size
    if asked is not None and asked < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size ({asked}) is smaller than the tokenizer's ({tokenizer.vocab_size})",
            "leave it out, or make it larger",
        )
    model = config.model.model_copy(update={"vocab_size": asked or tokenizer.vocab_size})
    return config.model_copy(update={"model": model})


def _share_checkpoint(
    config: Config,
    runtime: Runtime,
    corpora: Corpora,
    checkpoints: Checkpoints,
    resume: str | None,
    fresh: bool,
    reporter: Reporter,
) -> Saved | None:
    """Choose the checkpoint to continue from on the main rank, and open it on all, not proven."""
    chosen: list[Saved] = []

    def choose() -> str | None:
        saved = None if fresh else checkpoints.newest(hashed=False)
        own = saved is not None
        if saved is None and resume is not None:
            saved = open_checkpoint(Path(resume), "last", hashed=False)
            reporter.info(f"starting from {saved.path}")
        elif saved is not None:
            reporter.info(f"continuing {run_folder(config)} from step {saved.step}")
        if saved is None:
            return None
        refuse_other_run(config, saved, saved_config(saved), corpora, reporter.info)
        steps = config.training.max_steps or DEFAULT_STEPS
        if resume is not None and not own and steps <= saved.step and not config.training.epochs:
            raise ConfigError(
                f"{resume} is at step {saved.step} already", "give a larger --max-steps"
            )
        chosen.append(saved)
        return str(saved.path)

    path = runtime.on_main(choose)
    if path is None:
        return None
    return chosen[0] if chosen else read(Path(path), hashed=False)


def _loader(config: Config, corpora: Corpora, runtime: Runtime, layout: Layout) -> Loader:
    return corpora.loader(
        config.model.context,
        config.training.batch_size,
        config.seed,
        layout.data_rank(runtime.rank),
        layout.data,
        pin=runtime.device.type == "cuda",
    )


def _steps(config: Config, loader: Loader) -> int:
    most = None if loader.shares.total is None else loader.shares.total // loader.batch_size
    limits = [config.training.max_steps] if config.training.max_steps else []
    if config.training.epochs is not None:
        epochs = max(1, round(config.training.epochs * loader.steps_per_epoch))
        limits.append(epochs if most is None else max(1, min(epochs, most)))
    steps = min(limits, default=DEFAULT_STEPS)
    if most is not None and steps > most:
        raise ConfigError(
            f"{steps} steps of {loader.batch_size} sequences are {steps * loader.batch_size}, and "
            f"the mixture's max_epochs allow {loader.shares.total}",
            f"train for at most {most} steps, or raise max_epochs",
        )
    return steps


def _restore(proof: Proof | None, stepper: Stepper) -> TrainState:
    if proof is None:
        return TrainState()
    load_optimizer(stepper, proof.group("optimizer"))
    state = proof.saved.state
    if state["scaler"]:
        stepper.scaler.load_state_dict(state["scaler"])
    owes = state.get("owes_validation", False)  # older checkpoints do not say
    return TrainState(state["step"], state["best_loss"], state["tokens"], owes)
