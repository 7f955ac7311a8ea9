"""A run under way: what it has open, what it saves, what it says of itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dtt.config.load import to_yaml
from dtt.config.schema import Config
from dtt.data.corpora import Corpora
from dtt.data.loader import Loader
from dtt.data.packing import PackedWindows
from dtt.dist import Runtime
from dtt.errors import StorageError
from dtt.metrics.loggers import MetricsFile, Reporter
from dtt.metrics.meter import Meter, short_count
from dtt.metrics.trackers import Tracker
from dtt.model.decoder import Decoder, count_parameters
from dtt.parallel.layout import Layout
from dtt.parallel.shard import gathered, is_sharded
from dtt.tokenizer import fingerprint
from dtt.training.checkpoint import Checkpoints
from dtt.training.objective import Objective
from dtt.training.profile import StepProfiler
from dtt.training.step import Stepper


@dataclass
class TrainState:
    """What must survive a crash beside tensors; everything else is rebuilt from the config."""

    step: int = 0
    """Optimizer steps done."""
    best_loss: float | None = None
    """Lowest validation loss so far."""
    tokens: int = 0
    """Targets that these steps had."""


@dataclass
class Run:
    """A run under way, on one rank."""

    config: Config
    folder: Path
    runtime: Runtime
    layout: Layout
    corpora: Corpora
    model: Decoder
    objective: Objective
    stepper: Stepper
    loader: Loader
    steps: int
    state: TrainState
    checkpoints: Checkpoints
    reporter: Reporter
    metrics: MetricsFile | None
    trackers: list[Tracker]
    profiler: StepProfiler | None
    meter: Meter
    begun_at: int
    """The step at which this process took the run up."""
    again: str
    """What a person says to go on with this run."""

    def save(self, best_loss: float | None = None) -> None:
        """Save the state, on the rank that writes files; all ranks must ask."""
        tensors = self._tensors()
        if not self.runtime.is_main:
            return
        if self.metrics is not None:  # no step before a checkpoint may be missing there
            self.metrics.flush()
        state = {
            "step": self.state.step,
            "best_loss": self.state.best_loss,
            "tokens": self.state.tokens,
            "tokenizer": fingerprint(self.corpora.tokenizer),
            "corpus": self.corpora.name,
            "scaler": self.stepper.scaler.state_dict(),
        }
        files = {
            "config.yaml": to_yaml(self.config).encode(),
            "tokenizer.json": self.corpora.tokenizer.to_json().encode(),
        }
        self.checkpoints.save(self.state.step, tensors, state, files, best_loss=best_loss)

    def track(self, figures: Mapping[str, float | None]) -> None:
        """Show the figures of this step wherever curves are wanted."""
        for tracker in self.trackers:
            tracker.log(self.state.step, figures)

    def close(self) -> None:
        """Close what the run has open, after the save under way if there is one."""
        with suppress(StorageError):  # said already, or less than the error that ends the run
            self.checkpoints.finish()
        if self.metrics is not None:
            self.metrics.close()
        for tracker in self.trackers:
            tracker.close()

    def reserve(self) -> None:
        """Get the memory for saving ready in the background; call it after the first step."""
        if self.runtime.is_main and not is_sharded(self.objective):
            self.checkpoints.reserve(self._tensors())

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the state by group and name: whole on the rank that writes files."""
        groups = {
            "model": self.model.state_dict(),
            "optimizer": self.stepper.optimizer.named_state(),
        }
        if not is_sharded(self.objective):
            return groups
        main = self.runtime.is_main
        return {group: dict(gathered(tensors, main)) for group, tensors in groups.items()}

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time inside out of the tokens per second."""
        start = time.perf_counter()
        yield
        self.meter.paused(time.perf_counter() - start)


def announce(run: Run, precision: str) -> None:
    """Say what is about to run."""
    config, corpora, division = run.config, run.corpora, run.stepper.division
    m, t = config.model, config.training
    tokens = {split: short_count(corpora.total(split, "tokens")) for split in ("train", "val")}
    rows = {
        "run": f"{run.folder}  (seed {config.seed})",
        "data": f"{corpora.folders}: {tokens['train']} training tokens, "
        f"{tokens['val']} validation tokens, vocabulary {corpora.vocab_size}",
        "windows": ", ".join(_windows(run)),
        "model": f"{short_count(count_parameters(run.model))} parameters: {m.layers} layers x "
        f"{m.dim}, {m.heads} heads, context {m.context}",
        "batch": f"{t.batch_size} sequences = {short_count(t.batch_size * m.context)} tokens: "
        f"{division.micro_batch_size} x {division.accumulation} forwards x "
        f"{run.runtime.ranks} ranks" + f" ({run.layout})" * (run.layout.shard > 1),
        "device": f"{run.runtime.device}, {torch.get_num_threads()} threads a rank, {precision}",
        "length": f"{run.steps} steps, {run.steps / run.loader.steps_per_epoch:.2f} epochs; "
        f"{config.optimizer.name}, {config.schedule.name} from {config.optimizer.lr:g}",
    }
    for key, value in rows.items():
        run.reporter.info(f"{key:>7}  {value}".replace("torch.", ""))


def _windows(run: Run) -> Iterator[str]:
    """Say for each corpus how windows are cut, and its share in a mixture."""
    for portion, windows in zip(run.corpora.portions, run.loader.sources, strict=True):
        share = f"{portion.name} {portion.share:.1%} " if portion.name else ""
        how = "contiguous"
        if isinstance(windows, PackedWindows):
            how = f"whole documents where they fit, {windows.padding:.1%} padding"
        yield share + how + (", documents apart" if windows.isolate is not None else "")
