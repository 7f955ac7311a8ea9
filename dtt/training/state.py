"""A run under way: what it has open, what it saves, what it says of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
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
from dtt.metrics.background import HASTE, Background, close_all
from dtt.metrics.loggers import MetricsFile, Reporter
from dtt.metrics.meter import Cost, Meter, short_count, short_flops
from dtt.metrics.peak import measure_again
from dtt.metrics.resources import Resources
from dtt.metrics.trackers import PATIENCE
from dtt.tokenizer import fingerprint
from dtt.training.checkpoint import Checkpoints
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
    owes_validation: bool = False
    """Whether a signal cut the validation after the last step short; whoever goes on does it."""

    def is_complete(self, steps: int) -> bool:
        """Whether nothing is left to do in a run of so many steps."""
        return self.step >= steps and not self.owes_validation


@dataclass
class Run:
    """A run under way, on one rank."""

    config: Config
    folder: Path
    runtime: Runtime
    corpora: Corpora
    parameters: tuple[int, int]
    """Of the whole model, and those of them that a token passes."""
    parameter_names: list[str]
    """Of the whole model."""
    stepper: Stepper
    loader: Loader
    steps: int
    state: TrainState
    checkpoints: Checkpoints
    reporter: Reporter
    metrics: MetricsFile | None
    trackers: list[Background]
    profiler: StepProfiler | None
    meter: Meter
    resources: Resources | None
    begun_at: int
    """The step at which this process took the run up."""
    again: str
    """What a person says to go on with this run."""
    mistrusted: bool = False
    """Whether it was said that the MFU cannot be right."""

    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.state.is_complete(self.steps)

    def save(self, best_loss: float | None = None) -> None:
        """Save the state: on the rank that writes files, or where ranks divide the model on each
        what it has. All ranks must ask."""
        model, step, work = self.stepper.model, self.state.step, None
        if not model.is_whole:
            work = self.runtime.on_main(lambda: self.checkpoints.begin(step))
            if work is None:
                return
        elif not self.runtime.is_main:
            return
        if self.metrics is not None:  # no step before a checkpoint may be missing there
            self.metrics.flush()
        state = {
            "step": step,
            "best_loss": self.state.best_loss,
            "tokens": self.state.tokens,
            "owes_validation": self.state.owes_validation,
            "tokenizer": fingerprint(self.corpora.tokenizer),
            "corpus": self.corpora.name,
            "scaler": self.stepper.scaler.state_dict(),
        }
        files = {
            "config.yaml": to_yaml(self.config).encode(),
            "tokenizer.json": self.corpora.tokenizer.to_json().encode(),
        }
        tensors, parts = self._tensors(), None
        if work is not None:
            pieces = {g: list(model.pieces(group)) for g, group in tensors.items()}
            tensors = {g: {name: t for name, _, t in rows} for g, rows in pieces.items()}
            parts = {g: {name: part for name, part, _ in rows} for g, rows in pieces.items()}
        self.checkpoints.save(
            step, tensors, state, files, best_loss=best_loss, parts=parts, work=work
        )

    def report(self, readings: Mapping[str, float]) -> None:
        """Say and write how the run does, given the figures of the step that is done."""
        with self.meter.part("logging"):
            figures = self.meter.read(self.state.step)
            figures |= {} if self.resources is None else self.resources.read()
            if figures.get("mfu", 0.0) > 1 and not self.config.training.fp8:
                figures |= self._checked(figures.pop("mfu"))
            if self.metrics is not None:
                self.metrics.write(step=self.state.step, **figures)
                self.metrics.flush()
            self.reporter.step(self.state.step, {**readings, **figures})
            self.track(dict(_tracked({**readings, **figures})))

    def report_rest(self) -> None:
        """Write where the time went since the last report; call it when all is done."""
        times = self.meter.read_rest()
        if self.metrics is not None:
            self.metrics.write(step=self.state.step, **times)

    def _checked(self, mfu: float) -> dict[str, float]:
        """Return the MFU if it is right after all: above 100% the meter is wrong, not the run.

        A peak that was measured while something else was at work is measured again.
        """
        if self.mistrusted:
            return {}
        cost = self.meter.cost
        assert cost is not None
        dtype = self.stepper.model.stages[0].model.compute_dtype
        peak = measure_again(self.runtime.device, dtype, cost.peak)
        self.meter.cost = replace(cost, peak=peak)
        mfu *= cost.peak.flops / peak.flops
        if mfu <= 1:
            return {"mfu": mfu}
        self.mistrusted = True
        self.reporter.warning(
            f"the meter is wrong: an MFU of {mfu:.0%}, {short_flops(cost.flops)}FLOP a token "
            f"against a {peak.source} peak of {short_flops(peak.flops)}FLOP/s on each of "
            f"{cost.devices} devices; figures above 100% are left out"
        )
        return {}

    def track(self, figures: Mapping[str, float | None], step: int | None = None) -> None:
        """Show the figures of a step (the last that is done) wherever curves are wanted."""
        for tracker in self.trackers:
            tracker.log(self.state.step if step is None else step, figures)

    def show_picture(self, path: Path | None) -> None:
        """Show the picture of the loss, if there is one, wherever curves are wanted."""
        for tracker in self.trackers:
            if path is not None:
                tracker.picture(self.state.step, path.stem, path)

    def close(self, *, failed: bool) -> None:
        """Close what the run has open, after the save under way if there is one.

        A run that `failed` has other ranks to tell, and gives trackers less time.
        """
        with suppress(StorageError):  # said already, or less than the error that ends the run
            self.checkpoints.finish()
        if self.metrics is not None:
            self.metrics.close()
        if self.resources is not None:
            self.resources.close()
        close_all(self.trackers, HASTE if failed else PATIENCE)

    def reserve(self) -> None:
        """Get the memory for saving ready in the background; call it after the first step."""
        if self.runtime.is_main and self.stepper.model.is_whole:
            self.checkpoints.reserve(self._tensors())

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return what this rank has of the state, by group and name."""
        return {
            "model": self.stepper.model.state(),
            "optimizer": self.stepper.optimizer.named_state(),
        }


def _tracked(figures: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Yield figures by the names that trackers have them by; parts of time as shares."""
    seconds = max(figures["interval_seconds"], 1e-9)
    for name, value in figures.items():
        if name.startswith("time_"):
            yield f"time/{name.removeprefix('time_')}", value / seconds
        elif name in ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds_left"):
            yield f"train/{name}", value
        elif name != "interval_seconds":
            yield f"machine/{name}", value


def announce(run: Run, precision: str) -> None:
    """Say what is about to run."""
    config, corpora, division = run.config, run.corpora, run.stepper.division
    m, t, layout = config.model, config.training, run.stepper.model.layout
    tokens = {split: short_count(corpora.total(split, "tokens")) for split in ("train", "val")}
    rows = {
        "run": f"{run.folder}  (seed {config.seed})",
        "data": f"{corpora.folders}: {tokens['train']} training tokens, "
        f"{tokens['val']} validation tokens, vocabulary {corpora.vocab_size}",
        "windows": ", ".join(_windows(run)),
        "model": f"{_parameters(run)}: {m.layers} layers x {m.dim}, {m.heads} heads, "
        f"context {m.context}",
        "batch": f"{t.batch_size} sequences = {short_count(t.batch_size * m.context)} tokens: "
        f"{division.micro_batch_size} x {division.accumulation} forwards x "
        f"{layout.data} ranks" + f" ({layout})" * (not layout.is_plain),
        "device": f"{run.runtime.device}, {torch.get_num_threads()} threads a rank, {precision}",
        "length": f"{run.steps} steps, {run.steps / run.loader.steps_per_epoch:.2f} epochs; "
        f"{config.optimizer.name}, {config.schedule.name} from {config.optimizer.lr:g}",
    }
    if run.meter.cost is not None:
        rows["MFU"] = _utilisation(run.meter.cost, fp8=t.fp8)
    for key, value in rows.items():
        run.reporter.info(f"{key:>7}  {value}".replace("torch.", ""))


def _utilisation(cost: Cost, *, fp8: bool) -> str:
    """Say what 100% would be."""
    devices = f" x {cost.devices}" if cost.devices > 1 else ""
    source = cost.peak.source + ", without fp8" * fp8
    return (
        f"of {short_flops(cost.peak.flops)}FLOP/s{devices}, {source}; "
        f"{short_flops(cost.flops)}FLOP a token, forward and backward"
    )


def _parameters(run: Run) -> str:
    """Say how many parameters there are, and with experts how many of them a token passes."""
    total, active = (short_count(count) for count in run.parameters)
    experts = run.config.model.experts
    if experts is None:
        return f"{total} parameters"
    return f"{total} parameters ({active} active, {experts.active} of {experts.number} experts)"


def _windows(run: Run) -> Iterator[str]:
    """Say for each corpus how windows are cut, and its share in a mixture."""
    for portion, windows in zip(run.corpora.portions, run.loader.sources, strict=True):
        share = f"{portion.name} {portion.share:.1%} " if portion.name else ""
        how = "contiguous"
        if isinstance(windows, PackedWindows):
            how = f"whole documents where they fit, {windows.padding:.1%} padding"
        yield share + how + (", documents apart" if windows.isolate is not None else "")
