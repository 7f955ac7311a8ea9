"""What the cleaning steps would do, tried on a sample of a corpus before anything is prepared."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dtt.config.data import data_of_parts
from dtt.config.schema import Config
from dtt.config.sources import source_label
from dtt.data.cleaning.chain import EMPTY, Chain
from dtt.data.cleaning.duplicates import CorpusStep
from dtt.data.cleaning.step import Dropped
from dtt.data.sources import open_source
from dtt.errors import EXIT_DONE, ConfigError

SPREAD = 50
"""The sample comes from up to so many places of the corpus."""
EXCERPT = 88
"""Characters of a document that an example shows."""
BEFORE = 20
"""Characters in front of a change that an example shows."""
FEW, MANY = 2, 10
"""Examples of each kind, where all steps are shown and where one is."""


@dataclass
class StepReport:
    """What one step did to the sample."""

    name: str
    documents: int
    """That came to it."""
    characters: int = 0
    """That it left."""
    removed: Counter[str] = field(default_factory=Counter)
    """Documents by reason."""
    changed: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Excerpts by reason, and under "changed" as it was and as it is."""

    def add_example(self, kind: str, excerpt: str) -> None:
        found = self.examples.setdefault(kind, [])
        if len(found) < MANY:
            found.append(excerpt)


def sample(source: Any, count: int) -> list[str]:
    """Return about `count` documents, from places all over the corpus, always the same ones."""
    parts = source.parts(0.0)
    random.Random(0).shuffle(parts)
    parts = parts[:SPREAD]
    texts: list[str] = []
    for number, part in enumerate(parts):
        quota = -(-(count - len(texts)) // (len(parts) - number))
        for document, _ in zip(source.read(part), range(quota), strict=False):
            texts.append(document.text)
    return texts


def try_steps(chain: Chain, texts: list[str]) -> list[StepReport]:
    """Apply the steps to the texts, one step after another; duplicates are those among them."""
    reports = []
    for index, step in enumerate(chain.steps):
        report = StepReport(chain.names[index], len(texts))
        if index in chain.corpus_wide:
            texts = _without_duplicates(chain.corpus_wide[index], texts, report)
        else:
            texts = [kept for text in texts if (kept := _applied(step, text, report)) is not None]
        report.characters = sum(map(len, texts))
        reports.append(report)
    return reports


def _applied(step: Any, text: str, report: StepReport) -> str | None:
    result = step(text)
    if not isinstance(result, Dropped) and result != text and not result.strip():
        result = Dropped(EMPTY)
    if isinstance(result, Dropped):
        report.removed[result.reason] += 1
        report.add_example(result.reason, _excerpt(text))
        return None
    if result != text:
        report.changed += 1
        report.add_example("changed", _change(text, result))
    return str(result)


def _without_duplicates(step: CorpusStep, texts: list[str], report: StepReport) -> list[str]:
    signatures = [(i, s) for i, text in enumerate(texts) if (s := step.signature(text)) is not None]
    if not signatures:
        return texts
    packed = step.pack([signature for _, signature in signatures])
    again = step.repeated([packed], np.ones(len(signatures), bool))
    out = {signatures[place][0] for place in np.flatnonzero(again)}
    for number in sorted(out):
        report.removed[step.reason] += 1
        report.add_example(step.reason, _excerpt(texts[number]))
    return [text for number, text in enumerate(texts) if number not in out]


def _excerpt(text: str) -> str:
    beginning = text[: 2 * EXCERPT].strip()
    shown = repr(beginning[:EXCERPT])[1:-1]
    return f"{shown}..." if len(text.strip()) > EXCERPT else shown


def _change(old: str, new: str) -> str:
    """The first place where two texts differ, as it was and as it is."""
    pairs = enumerate(zip(old, new, strict=False))
    same = next((place for place, (a, b) in pairs if a != b), min(len(old), len(new)))
    start = max(same - BEFORE, 0)
    # Two ways to write a character look alike, so they are shown by their numbers.
    show = repr if (old[same : same + 1] + new[same : same + 1]).isascii() else ascii
    lines = (show(text[start : start + EXCERPT])[1:-1] for text in (old, new))
    return "\n      -> ".join(lines)


def inspect_command(config: Config, *, documents: int, step: str | None) -> int:
    """Print what the cleaning steps of a configuration would do, and return the exit code."""
    parts = [one for one in data_of_parts(config.data) if one.cleaning]
    if not parts:
        raise ConfigError(
            "data.cleaning is empty: there is nothing to inspect",
            "name its steps, such as --data.cleaning unicode gopher exact-dedup",
        )
    names = dict.fromkeys(settings.name for data in parts for settings in data.cleaning)
    if step is not None and step not in names:
        raise ConfigError(f"--step {step}: the steps are {', '.join(names)}")
    for data in parts:
        source = open_source(data.source, data.dir)
        texts = sample(source, documents)
        label = source_label(data.source)
        print(f"{label}: {len(texts):,} documents, {sum(map(len, texts)):,} characters\n")
        _print_reports(try_steps(Chain(data.cleaning), texts), sum(map(len, texts)), step)
        for reason, count in sorted(source.bad.items()):
            print(f"{reason}: {count:,}")
    return EXIT_DONE


def _print_reports(reports: list[StepReport], characters: int, only: str | None) -> None:
    print(f"{'step':<20} {'documents':>10} {'removed':>10} {'changed':>10} {'text left':>10}")
    for number, report in enumerate(reports, 1):
        left = report.characters / characters if characters else 0.0
        print(
            f"{f'{number} {report.name}':<20} {report.documents:>10,} "
            f"{report.removed.total():>10,} {report.changed:>10,} {left:>10.1%}"
        )
    for number, report in enumerate(reports, 1):
        if only not in (None, report.name) or not report.examples:
            continue
        print(f"\n{number} {report.name}")
        for reason, count in [*report.removed.most_common(), ("changed", report.changed)]:
            if not count:
                continue
            share = count / report.documents
            print(f"  {reason}: {count:,} ({share:.1%})")
            for excerpt in report.examples[reason][: FEW if only is None else MANY]:
                print(f"      {excerpt}")
    if any(report.name.endswith("-dedup") for report in reports):
        print("\nDuplicates are those inside of the sample; the whole corpus has more.")
