"""Loss, perplexity and bits per byte of a model over a whole split, weighted by tokens."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from json import dumps as dump_json
from pathlib import Path

import torch
from torch import Tensor

from dtt.data.corpora import Corpora, Portion, prepare_corpora
from dtt.data.loader import Batch, overlapping_batches, packed_batches
from dtt.data.packing import PackedWindows
from dtt.data.progress import progress
from dtt.data.windows import IGNORED
from dtt.dist import Place, Runtime
from dtt.errors import EXIT_DONE, ConfigError, DataError
from dtt.metrics.loggers import perplexity
from dtt.model.objective import Objective
from dtt.parallel.model import ParallelModel
from dtt.training.load import load_run


class CutShort(Exception):  # noqa: N818 - what it says is no failure
    """Somebody asked to stop before all was measured; raised on all ranks."""


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Evaluation:
    """What a model knows of a text."""

    loss: float
    """Nats per token."""
    perplexity: float
    tokens: int
    bits_per_byte: float
    """Comparable between tokenizers. Over the whole split it counts each end of a document too."""
    floor: float | None = None
    """The lowest possible bits per byte, where the source knows it."""

    @property
    def above_floor(self) -> float | None:
        """How far above the floor, as a share of it (0.05 is five percent)."""
        return None if self.floor is None else self.bits_per_byte / self.floor - 1

    def line(self) -> str:
        """Return the figures as a person reads them."""
        text = (
            f"loss {self.loss:.4f}  ppl {self.perplexity:.4g}  {self.bits_per_byte:.4f} bits/byte"
        )
        if self.floor is not None and self.above_floor is not None:
            text += f" (floor {self.floor:.4f}, {self.above_floor:+.1%})"
        return text


def _total(values: Tensor, runtime: Runtime) -> Tensor:
    """Add up over ranks; a single device, such as mps, may not have fp64."""
    return runtime.sum(values.to(runtime.device)).cpu() if runtime.ranks > 1 else values


def evaluate(
    model: ParallelModel,
    corpora: Corpora,
    split: str,
    *,
    batch_size: int,
    stride: int | None = None,
    max_tokens: int | None = None,
    stop: Callable[[], bool] = _never,
) -> tuple[Evaluation, dict[str, Evaluation]]:
    """Return the model's figures over a split, and those of each corpus of a mixture by name.

    Every token of the split is a target exactly once. Windows are cut as in training, but with
    `stride` they follow each other and overlap, so that each target has more text before it. Ranks
    divide the windows; each may have one batch less than another. The figures of a mixture are
    those of its corpora in their shares of the training tokens. If `stop` is true on some rank
    between two batches, all ranks raise CutShort; where ranks do not divide the model, those that
    were not asked measure what is theirs first.
    """
    was_training = model.training
    model.set_training(False)
    batch_size = model.pipeline.rows if model.pipeline is not None else batch_size
    found = {}
    try:
        for portion in corpora.portions:
            batches = _batches(corpora, portion, split, model, batch_size, stride, max_tokens)
            if not model.is_whole:
                batches = _in_step(batches, model, batch_size, stop)
            found[portion.name] = _measure(model, portion, split, batches, stop)
    finally:
        model.set_training(was_training)
    if not corpora.data.mixture:
        return found[""], {}
    return _mixed([(p.share, found[p.name]) for p in corpora.portions]), found


def _batches(
    corpora: Corpora,
    portion: Portion,
    split: str,
    model: ParallelModel,
    batch_size: int,
    stride: int | None,
    max_tokens: int | None,
) -> Iterable[Batch]:
    stream = portion.corpus.stream(split)
    if len(stream) < 2:
        raise DataError(f"the {split} split has no tokens", "prepare it with another data.split")
    context, rank, ranks = model.settings.context, model.data_rank, model.layout.data
    isolate = corpora.isolate(portion, context)
    if stride is None and corpora.packing(portion, context) == "best-fit":
        windows = PackedWindows(stream, context, isolate)
        return packed_batches(windows, batch_size, max_tokens, rank, ranks)
    return overlapping_batches(
        stream, context, batch_size, stride, max_tokens, isolate, rank, ranks
    )


def _measure(
    model: ParallelModel,
    portion: Portion,
    split: str,
    batches: Iterable[Batch],
    stop: Callable[[], bool],
) -> Evaluation:
    totals, runtime = torch.zeros(3, dtype=torch.float64), model.mesh.runtime
    for batch in batches:
        if model.is_whole and stop():  # else `_in_step` asks all ranks together
            totals[2] = 1
            break
        given = {"targets": batch.targets.to(runtime.device)}
        if batch.positions is not None:
            given["positions"] = batch.positions.to(runtime.device)
        totals[0] += model.loss(batch.tokens.to(runtime.device), given).cpu().double()
        totals[1] += batch.count if model.counts_data else 0
    nats, count, stopped = (float(x) for x in _total(totals, runtime))
    if stopped:
        raise CutShort
    manifest = portion.corpus.manifest
    # Bytes per token of the whole split, also where only a part of it was evaluated.
    size = manifest.total(split, "bytes") * count / manifest.total(split, "tokens")
    ideal = manifest.ideal_bits(split)
    return Evaluation(
        loss=nats / count,
        perplexity=perplexity(nats / count),
        tokens=int(count),
        bits_per_byte=nats / math.log(2) / size,
        floor=ideal / manifest.total(split, "bytes") if ideal else None,
    )


def _in_step(
    batches: Iterable[Batch], model: ParallelModel, rows: int, stop: Callable[[], bool]
) -> Iterator[Batch]:
    """Yield a rank's batches, padded to one shape, and then ones without targets until no rank has
    any left; CutShort if one was asked to stop."""
    shape = rows, model.settings.context
    own, with_positions = iter(batches), False
    while True:
        batch = next(own, None)
        with_positions |= batch is not None and batch.positions is not None
        said = [batch is not None, with_positions, stop()]
        left = _total(torch.tensor(said, dtype=torch.float64), model.mesh.runtime)
        if left[2]:
            raise CutShort
        if not left[0]:
            return
        tokens, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
        positions = torch.arange(shape[1]).repeat(rows, 1)
        if batch is not None:
            place = (slice(len(batch.tokens)), slice(batch.tokens.shape[1]))
            tokens[place], targets[place] = batch.tokens, batch.targets
            if batch.positions is not None:
                positions[place] = batch.positions
        count = 0 if batch is None else batch.count
        yield Batch(tokens, targets, positions if left[1] else None, count, ())


def _mixed(parts: list[tuple[float, Evaluation]]) -> Evaluation:
    loss = sum(share * part.loss for share, part in parts)
    # Bytes of a token, in each corpus and in the mixture.
    sizes = [part.loss / math.log(2) / part.bits_per_byte for _, part in parts]
    size = sum(share * s for (share, _), s in zip(parts, sizes, strict=True))
    return Evaluation(
        loss=loss,
        perplexity=perplexity(loss),
        tokens=sum(part.tokens for _, part in parts),
        bits_per_byte=loss / math.log(2) / size,
    )


def _warn(text: str) -> None:
    print(f"dtt evaluate: warning: {text}", file=sys.stderr)


def evaluate_command(
    *,
    run: Path | None,
    checkpoint: str,
    split: str,
    stride: int | None,
    batch_size: int | None,
    max_tokens: int | None,
    device: str,
    precision: str,
    json: bool,
) -> int:
    """Print the figures of a run's checkpoint on its own corpus; return the exit code."""
    loaded = load_run(run, checkpoint=checkpoint, device=device, precision=precision, cast=False)
    config = loaded.config
    if stride is not None and stride > config.model.context:
        raise ConfigError(
            f"--stride {stride} is longer than the model's context ({config.model.context})",
            "some tokens would be left out: use a shorter stride",
        )
    with progress() as advance:
        corpora = prepare_corpora(config.data, config.tokenizer, report=_warn, advance=advance)
    if corpora.name != loaded.corpus:
        raise DataError(
            f"the text has changed since {loaded.folder} was trained: {corpora.folders} is not "
            f"{loaded.corpus}",
            "restore the text that it was trained on",
        )
    runtime = Runtime(Place(), loaded.model.head_weight.device)
    begun = time.perf_counter()
    result, parts = evaluate(
        ParallelModel.alone(Objective(loaded.model), runtime),
        corpora,
        split,
        batch_size=batch_size or config.evaluation.batch_size or config.training.batch_size,
        stride=stride,
        max_tokens=max_tokens,
    )
    if json:
        row = {"run": str(loaded.folder), "step": loaded.step, "split": split, **asdict(result)}
        row |= {"above_floor": result.above_floor}
        if parts:
            row["parts"] = {name: asdict(part) for name, part in parts.items()}
        print(dump_json(row))
        return EXIT_DONE
    seconds = time.perf_counter() - begun
    print(f"{loaded.folder}, step {loaded.step}, {split} split of {corpora.folders}")
    for name, part in parts.items():
        print(f"{name}: {part.line()}")
    print(result.line())
    print(f"{result.tokens:,} tokens in {seconds:.1f} s")
    return EXIT_DONE
