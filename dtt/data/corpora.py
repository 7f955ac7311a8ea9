"""What a run trains on: one prepared corpus, or a mixture of several with one tokenizer."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dtt.config.data import Data, data_of_parts
from dtt.config.data import Tokenizer as TokenizerSettings
from dtt.data.mixture import Shares
from dtt.data.packing import PackedWindows, choose_packing
from dtt.data.preparation.crew import Crew
from dtt.data.preparation.joined import shared_tokenizer
from dtt.data.preparation.prepare import Corpus, Report, open_corpus, prepare
from dtt.data.preparation.workers import LocalWorkers, Workers
from dtt.data.progress import Advance, silent
from dtt.data.shards import SPLITS
from dtt.data.windows import ContiguousWindows, Windows
from dtt.errors import DataError
from dtt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dtt.data.loader import Loader


@dataclass(frozen=True)
class Portion:
    """A corpus and its part in the mixture."""

    name: str
    """Empty where it is the only one."""
    corpus: Corpus
    share: float
    """Of the training tokens, until another corpus has reached its limit."""
    max_epochs: float | None = None


@dataclass(frozen=True)
class Corpora:
    """One or several prepared corpora, with shares that sum to 1."""

    data: Data
    portions: tuple[Portion, ...]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all of them."""
        return self.portions[0].corpus.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.portions[0].corpus.manifest.vocab_size

    @property
    def name(self) -> str:
        """The names of the folders, which hold a hash of everything that they were made from."""
        return "+".join(portion.corpus.folder.name for portion in self.portions)

    @property
    def folders(self) -> str:
        """Where they lie, for people."""
        return ", ".join(str(portion.corpus.folder) for portion in self.portions)

    def isolate(self, portion: Portion, context: int) -> int | None:
        """The end-of-text token, if documents of a corpus must not see each other."""
        asked, packed = self.data.documents, self.packing(portion, context) == "best-fit"
        isolated = asked == "isolate" or (asked == "auto" and packed)
        return self.tokenizer.end_of_text if isolated else None

    def total(self, split: str, figure: str) -> int:
        """Sum of a figure of the manifests over a split."""
        return sum(portion.corpus.manifest.total(split, figure) for portion in self.portions)

    def packing(self, portion: Portion, context: int) -> str:
        """Return how windows of a corpus are cut: "contiguous" or "best-fit"."""
        return choose_packing(self.data.packing, portion.corpus.manifest, context)

    def windows(self, portion: Portion, context: int, seed: int) -> Windows:
        """Return the training windows of a corpus; DataError if there is not one."""
        stream = portion.corpus.stream("train")
        have, need = len(stream), context + 1
        if have < need:
            which = f" of {portion.name}" if portion.name else ""
            raise DataError(
                f"the training text{which} has {have} tokens, one window needs {need} "
                f"(model.context {context} + 1)",
                f"give more text, a model.context below {have}, or data.repeat",
            )
        isolate = self.isolate(portion, context)
        if self.packing(portion, context) == "best-fit":
            return PackedWindows(stream, context, isolate)
        return ContiguousWindows(stream, context, seed, isolate)

    def pack(self, context: int) -> None:
        """Cut the windows of packed corpora now, so that training need not when it starts."""
        for portion in self.portions:
            if self.packing(portion, context) == "best-fit":
                for split in SPLITS:
                    PackedWindows(portion.corpus.stream(split), context)

    def loader(
        self, context: int, batch_size: int, seed: int, rank: int, ranks: int, *, pin: bool
    ) -> Loader:
        """Return the training batches of one rank."""
        from dtt.data.loader import Loader  # it loads torch, which preparing data does not need

        sources = [self.windows(portion, context, seed) for portion in self.portions]
        limits = [
            None if portion.max_epochs is None else max(1, round(portion.max_epochs * source.count))
            for portion, source in zip(self.portions, sources, strict=True)
        ]
        # Shares are of tokens, and padded windows have fewer of them.
        weights = [
            _rounded(portion.share / min(1.0, (len(source.stream) - 1) / (source.count * context)))
            for portion, source in zip(self.portions, sources, strict=True)
        ]
        shares = Shares(weights, limits)
        return Loader(sources, batch_size, seed, rank, ranks, shares=shares, pin=pin)


def prepare_corpora(
    data: Data,
    tokenizer: TokenizerSettings,
    *,
    force: bool = False,
    report: Report = lambda line: None,
    advance: Advance = silent,
    crew: Crew | None = None,
    workers: Workers | None = None,
) -> Corpora:
    """Return the prepared corpora of these settings, making what is missing of them."""
    with contextlib.ExitStack() as stack:
        crew = crew or stack.enter_context(Crew(data.dir))
        make = partial(prepare, force=force, advance=advance, crew=crew, workers=workers)
        if not data.mixture:
            return Corpora(data, (Portion("", make(data, tokenizer, report=report), 1.0),))
        datas, workers = data_of_parts(data), workers or LocalWorkers(data.workers)
        given = shared_tokenizer(datas, tokenizer, crew, workers, advance, force=force)
        made = [
            make(one, given, report=partial(_report_of, part.name, report))
            for one, part in zip(datas, data.mixture, strict=True)
        ]
        return _mix(data, made)


def _report_of(name: str, report: Report, line: str) -> None:
    report(f"{name}: {line}")


def open_corpora(data: Data, folders: list[str]) -> Corpora:
    """Open what another rank has prepared, by the folders' names."""
    made = [open_corpus(data.dir / folder) for folder in folders]
    return _mix(data, made) if data.mixture else Corpora(data, (Portion("", made[0], 1.0),))


def _mix(data: Data, made: list[Corpus]) -> Corpora:
    weights = [
        part.weight or _rounded(corpus.manifest.total("train", "tokens") ** (1 / data.temperature))
        for part, corpus in zip(data.mixture, made, strict=True)
    ]
    total = math.fsum(weights)
    return Corpora(
        data,
        tuple(
            Portion(part.name, corpus, weight / total, part.max_epochs)
            for part, corpus, weight in zip(data.mixture, made, weights, strict=True)
        ),
    )


def _rounded(weight: float) -> float:
    """Nine digits: what is left does not depend on a machine's mathematical library."""
    return float(f"{weight:.9g}")
