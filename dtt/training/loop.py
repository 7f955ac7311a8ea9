"""The loop: what happens in a run, in order."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass

from torch.nn.utils import get_total_norm

from dtt.config.schema import Config
from dtt.dist import local
from dtt.errors import NumericError
from dtt.evaluation import CutShort, Evaluation, evaluate
from dtt.generation import Sampling, sample_texts
from dtt.metrics.meter import short_duration
from dtt.metrics.progress import Progress, read_progress
from dtt.optim.schedule import learning_rate
from dtt.training.memory import Phase, memory_explained
from dtt.training.norms import log_norms
from dtt.training.preemption import Preemption
from dtt.training.state import Run, TrainState
from dtt.training.step import StepResult
from dtt.training.waiting import waits_counted

CALM = "lower optimizer.lr or lengthen schedule.warmup_steps, and go on from the last checkpoint"

Asked = Callable[[], bool]
"""Tells whether this rank was asked to stop."""


@dataclass(frozen=True)
class Due:
    """Which of the things that happen now and then happen after a step."""

    config: Config
    steps: int
    steps_per_epoch: float

    def log(self, step: int) -> bool:
        return step % self.config.logging.every == 0 or step in (1, self.steps)

    def norms(self, step: int) -> bool:
        every = self.config.logging.norms_every
        return every > 0 and step % every == 0

    def evaluate(self, step: int) -> bool:
        return self._every(self.config.evaluation.every, step)

    def sample(self, step: int) -> bool:
        return bool(self.config.sample.prompts) and self._every(self.config.sample.every, step)

    def checkpoint(self, step: int) -> bool:
        epochs = self.config.checkpoint.every_epochs
        if epochs is not None:
            length = epochs * self.steps_per_epoch
            if step // length > (step - 1) // length:
                return True
        return self._every(self.config.checkpoint.every, step)

    def _every(self, interval: int, step: int) -> bool:
        return step == self.steps or (interval > 0 and step % interval == 0)


class Readings:
    """Figures of steps, read when the device has them.

    On an accelerator the newest step stays unread, so that the device always has work while the
    host waits; every rank reads the same steps at the same time, so all decide alike.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._waiting: deque[tuple[int, int, float, StepResult]] = deque()
        self._lag = 0 if run.runtime.device.type == "cpu" else 1
        self.last: dict[str, float] = {}
        self.stop = False
        """Whether some rank was asked to stop."""
        self.validation: tuple[int, Evaluation] | None = None
        """The newest validation, and the step that it was after."""

    def add(self, step: int, tokens: int, factor: float, result: StepResult) -> None:
        self._waiting.append((step, tokens, factor, result))
        while len(self._waiting) > self._lag:
            self._read()

    def drain(self) -> None:
        """Read all steps: before anything is saved or said."""
        while self._waiting:
            self._read()

    def _read(self) -> None:
        run = self._run
        step, tokens, factor, result = self._waiting.popleft()
        with run.meter.part("device"):
            nats, stops, seen = result.totals.tolist()
        loss, norm = nats / result.tokens, float(result.grad_norm)
        self.stop |= stops > 0
        # With fp16 a gradient may overflow: the scaler skips that update and lowers its scale.
        if not math.isfinite(loss) or not (math.isfinite(norm) or run.stepper.scaler.is_enabled()):
            raise NumericError(
                f"step {step}: the loss is {loss} and the gradient norm {norm}", CALM
            )
        lr = run.config.optimizer.lr * factor
        self.last = {"loss": loss, "lr": lr, "grad_norm": norm}
        if run.metrics is not None:
            samples = int(seen) if result.seen is None else result.seen
            with run.meter.part("logging"):
                run.metrics.write(step=step, **self.last, tokens=tokens, samples=samples)


def fit(run: Run) -> TrainState:
    """Train to run.steps, or until a signal asks to stop, and save.

    What must survive a crash is in `run.state`; everything else is rebuilt from the config.
    """
    state, due = run.state, Due(run.config, run.steps, run.loader.steps_per_epoch)
    batches, readings = run.loader.iter_from(state.step), Readings(run)
    waits = waits_counted(run.stepper.model, run.meter)
    with Preemption() as preemption, run.reporter.bar(state.step), closing(batches), waits:
        asked = preemption.asked
        if state.owes_validation:
            milestones(run, due, readings, asked)
        while state.step < run.steps and not readings.stop:
            with run.meter.part("data"):
                batch = next(batches)
            with run.meter.part("compute"):
                result = run.stepper.step(batch, state.step, asked)
            factor = learning_rate(run.config.schedule, state.step, run.steps)
            check_step(run, due, readings, factor, result)  # raises before a bad update
            with run.meter.part("optimizer"):
                run.stepper.update(factor)
            count_step(run, due, readings, result.tokens, asked)
        end(run)  # a second signal must not end what the first asked for
    return state


def check_step(run: Run, due: Due, readings: Readings, factor: float, result: StepResult) -> None:
    """Take the figures of a step whose update, with this factor of the learning rate, comes next.

    NumericError if the loss or the gradient is not finite; on an accelerator that is found out a
    step later, before anything is saved.
    """
    step, tokens = run.state.step + 1, run.state.tokens + result.tokens
    readings.add(step, tokens, factor, result)
    if due.norms(step):
        log_norms(run, step, result.grad_norm)


def count_step(run: Run, due: Due, readings: Readings, tokens: int, asked: Asked) -> None:
    """Count a step of so many target tokens whose update is done, and do what is due after it."""
    state = run.state
    state.step, state.tokens = state.step + 1, state.tokens + tokens
    run.meter.add(tokens)
    if state.step == run.begun_at + 1:
        run.reserve()  # the optimizer has its state from now on
    run.reporter.advance(state.step, readings.last.get("loss"))
    if run.profiler is not None:
        with run.meter.part("logging"):
            run.profiler.step()
    if due.log(state.step):
        _log(run, readings)
    milestones(run, due, readings, asked)


def milestones(run: Run, due: Due, readings: Readings, asked: Asked) -> None:
    """Validate, let the model write, and save: what is due after the last step.

    A signal cuts the first two short; the validation is then owed by whoever goes on, so that a run
    with stops has the same checkpoints as one without.
    """
    step, owed = run.state.step, run.state.owes_validation
    best = validate(run, readings, asked) if due.evaluate(step) else None
    if due.sample(step) and not readings.stop:
        _sample(run, asked)
    run.checkpoints.poll()
    if due.checkpoint(step) or best is not None or readings.stop or owed:
        save(run, readings, best)


def save(run: Run, readings: Readings, best: float | None = None) -> None:
    """Save the state, with the validation loss if it is the lowest so far."""
    readings.drain()
    with run.meter.part("saving"):
        _refuse_bad_weights(run)
        run.save(best)


def end(run: Run) -> None:
    """End what goes on beside the steps; StorageError if the last save failed."""
    if run.profiler is not None:
        run.profiler.close()
    with run.meter.part("saving"):
        run.checkpoints.finish()
    run.report_rest()
    _note_progress(run)


def _refuse_bad_weights(run: Run) -> None:
    """The loss of the next step would show it, but a checkpoint is written before that."""
    parts = [part for p in run.stepper.parameters if (part := local(p)).numel()]
    bad = (~get_total_norm(parts, math.inf).isfinite()).float().to(run.runtime.device)
    if run.runtime.sum(bad).item():
        raise NumericError(f"step {run.state.step}: its update made weights not finite", CALM)


def _log(run: Run, readings: Readings) -> None:
    readings.drain()
    run.report(readings.last)
    with run.meter.part("logging"):
        _note_progress(run)


def _note_progress(run: Run) -> None:
    """Write progress.json, with the figures of the last log line."""
    figures = run.meter.last
    if not run.runtime.is_main or not figures:
        return
    saved = run.checkpoints.longest
    if saved is None and (old := read_progress(run.folder)) is not None:
        saved = old.save_seconds
    Progress(
        run.state.step,
        run.steps,
        figures["tokens_per_second"],
        figures["seconds_left"],
        run.meter.slowest,
        saved,
    ).write(run.folder)


@contextmanager
def _beside(run: Run, what: Phase) -> Iterator[None]:
    """Measure the time of what is no training, and explain a lack of memory for it."""
    with run.meter.part(what), memory_explained(run.config, run.runtime, run.folder, what):
        yield


def validate(run: Run, readings: Readings, asked: Asked) -> float | None:
    """Measure the validation loss; return it if it is the lowest so far."""
    readings.drain()
    settings, state = run.config.evaluation, run.state
    state.owes_validation = False
    try:
        with _beside(run, "evaluating"):
            result, parts = evaluate(
                run.stepper.model,
                run.corpora,
                "val",
                batch_size=settings.batch_size or run.stepper.division.micro_batch_size,
                max_tokens=settings.max_tokens,
                stop=asked,
            )
    except CutShort:
        state.owes_validation = readings.stop = True
        return None
    if not math.isfinite(result.loss):
        raise NumericError(f"step {state.step}: the validation loss is {result.loss}", CALM)
    readings.validation = state.step, result
    improved = state.best_loss is None or result.loss < state.best_loss
    if improved:
        state.best_loss = result.loss
    run.reporter.info(f"step {state.step} validation  {result.line()}{'  best' * improved}")
    for name, part in parts.items():
        run.reporter.info(f"  {name}: {part.line()}")
    every = {"": result} | {f"/{name}": part for name, part in parts.items()}
    figures = {k + name: v for name, part in every.items() for k, v in asdict(part).items()}
    run.track({f"val/{key}": value for key, value in figures.items()})
    if run.metrics is not None:
        run.metrics.write(step=state.step, **{f"val_{key}": v for key, v in figures.items()})
        run.metrics.flush()
    return result.loss if improved else None


def _sample(run: Run, asked: Asked) -> None:
    """Let the model write, on the main rank; the others go on and wait at the next step."""
    model = run.stepper.model

    def look(*progress: object) -> None:
        if asked():
            raise CutShort

    if not model.is_whole:
        run.reporter.info("no samples while ranks divide the model: `dtt generate` writes them")
        return
    if not run.runtime.is_main:
        return
    settings = run.config.sample
    sampling = Sampling(settings.temperature, settings.top_k, settings.top_p)
    try:
        with _beside(run, "sampling"):
            texts = sample_texts(
                model.stages[0].model,
                run.corpora.tokenizer,
                list(settings.prompts),
                settings.max_length,
                sampling,
                seed=run.config.seed,
                advance=look,
            )
    except CutShort:
        return
    with (run.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
        for prompt, text in zip(settings.prompts, texts, strict=True):
            run.reporter.info(f"--- step {run.state.step}, sample:\n{prompt}{text}", style="cyan")
            for tracker in run.trackers:
                tracker.text(run.state.step, f"sample/{prompt}", text)
            row = {"step": run.state.step, "prompt": prompt, "text": text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def closing_lines(run: Run, seconds: float) -> Iterator[str]:
    """What a person wants to know at the end, and what to do next."""
    state = run.state
    if not run.is_complete():
        yield f"stopped at step {state.step} of {run.steps}, saved; {run.again} goes on from there"
        return
    yield run.meter.where_the_time_went()
    done, duration = run.steps - run.begun_at, short_duration(seconds)
    yield f"done: {done} steps in {duration}; everything is in {run.folder}"
    yield f"  dtt evaluate {run.folder}"
    yield f'  dtt generate {run.folder} --prompt "..."'
