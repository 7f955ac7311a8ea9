"""Several sources as one, and the tokenizer that is trained on all of them."""

from __future__ import annotations

import bisect
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from dtt import storage
from dtt.config.data import Byte, Data, TokenizerFile
from dtt.config.data import Tokenizer as TokenizerSettings
from dtt.data.cleaning.scan import find_duplicates
from dtt.data.preparation.crew import Crew
from dtt.data.preparation.prepare import Plan, plan_corpus
from dtt.data.preparation.sample import train_tokenizer
from dtt.data.preparation.workers import Workers
from dtt.data.progress import Advance
from dtt.data.sources import Document, Part
from dtt.errors import StorageError
from dtt.tokenizer import named_end


class JoinedReader:
    """The parts of several planned corpora, one after another: a source for a tokenizer."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.plans = list(plans)
        self._ends = list(accumulate(len(plan.parts) for plan in plans))
        self.bad: Counter[str] = Counter()
        """Stays empty: what is bad is counted where the corpora are made."""

    def documents(self) -> int | None:
        counts = [plan.source.documents() for plan in self.plans]
        return None if None in counts else sum(count or 0 for count in counts)

    def fingerprint(self) -> dict[str, Any]:
        return {"sources": [plan.spec for plan in self.plans]}

    def parts(self, tail: float) -> list[Part]:
        """All parts as they were planned, numbered through; the split is the plans'."""
        parts = [part for plan in self.plans for part in plan.parts]
        return [replace(part, index=index) for index, part in enumerate(parts)]

    def read(self, part: Part) -> Iterator[Document]:
        number = bisect.bisect_right(self._ends, part.index)
        plan, before = self.plans[number], ([0, *self._ends])[number]
        return plan.source.read(plan.parts[part.index - before])


def shared_tokenizer(
    datas: Sequence[Data],
    settings: TokenizerSettings,
    crew: Crew,
    workers: Workers,
    advance: Advance,
    *,
    force: bool = False,
) -> TokenizerFile:
    """Return the tokenizer of several corpora, trained on the text of all; it is found again.

    It lies in data.dir/tokenizers, in a folder whose name holds a hash of what it depends on. It is
    made again with `force`, or if it is not what was written.
    """
    if isinstance(settings, TokenizerFile):
        return settings
    # Plans do not depend on the tokenizer but for their folders' names, which are not used.
    source = JoinedReader([plan_corpus(data, Byte()) for data in datas])
    spec = source.fingerprint() | {"tokenizer": settings.model_dump(mode="json")}
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]
    folder = datas[0].dir / "tokenizers" / f"{settings.name}-{digest}"
    path, digest_path = folder / "tokenizer.json", folder / "sha256"

    def make() -> None:
        storage.make_folder(folder)
        made = train_tokenizer(
            source,
            settings,
            source.parts(0.0),
            val_fraction=datas[0].val_fraction,
            workers=workers,
            advance=advance,
            scratch=folder,
        )
        written = storage.write_atomic(path, made.to_json())
        storage.write_atomic(digest_path, written.digest)
        crew.forget()

    def is_made() -> bool:
        try:
            return storage.file_digest(path) == digest_path.read_text(encoding="ascii")
        except (OSError, ValueError, StorageError):
            return False

    if force or not crew.alone or not is_made():
        crew.meet(
            f"tokenizer-{folder.name}",
            lambda: digest_path.unlink(missing_ok=True) if force else None,
        )
        if not is_made():
            for plan in source.plans:
                find_duplicates(plan.source, plan.parts, crew, workers, advance)
        crew.once("tokenizer", is_made, make)
    return TokenizerFile(path=path, end_of_text=named_end(settings.model_dump()))
