"""The steps of a corpus, in their order, and what each of them did."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dtt.config.cleaning import Step
from dtt.data.cleaning.decontamination import Decontamination
from dtt.data.cleaning.duplicates import CorpusStep, ExactDuplicates, NearDuplicates
from dtt.data.cleaning.normalize import UnicodeForm
from dtt.data.cleaning.patterns import DropMatches, MaskAddresses, ReplaceMatches
from dtt.data.cleaning.quality import (
    C4Lines,
    FineWebQuality,
    GopherQuality,
    GopherRepetitions,
    LengthLimits,
)
from dtt.data.cleaning.step import Dropped, Rule
from dtt.data.cleaning.user import UserStep

# name: (what does it, version: raise it with every change of what the step gives, so that data
# that was cleaned before is not taken for data of now)
RULES: dict[str, tuple[Any, int]] = {
    "unicode": (UnicodeForm, 1),
    "length": (LengthLimits, 1),
    "gopher": (GopherQuality, 1),
    "gopher-repetition": (GopherRepetitions, 1),
    "c4": (C4Lines, 1),
    "fineweb": (FineWebQuality, 1),
    "regex-drop": (DropMatches, 1),
    "regex-replace": (ReplaceMatches, 1),
    "pii": (MaskAddresses, 1),
    "decontaminate": (Decontamination, 1),
    "user": (UserStep, 1),
}
# These judge a document by all others, so they need a pass of their own over the corpus first.
CORPUS_WIDE: dict[str, tuple[Any, int]] = {
    "exact-dedup": (ExactDuplicates, 1),
    "near-dedup": (NearDuplicates, 1),
}
EMPTY = "nothing remains"
COUNT = re.compile(r"cleaning (\d+) (\S+): (changed|removed, (.*))")


@dataclass
class Outcome:
    """What the steps made of a text."""

    text: str | None
    """None: a step left the document out."""
    step: int = -1
    """Index of that step."""
    reason: str = ""
    changed: list[int] = field(default_factory=list)
    """Indices of the steps that changed it."""


Judge = Callable[[int, str], bool]
"""Told the index of a corpus-wide step and a text: whether the document is left out."""


class Chain:
    """The cleaning steps of a corpus, made from their settings.

    DataError: a file or package that a step needs is missing, or a user's function is.
    """

    def __init__(self, settings: Sequence[Step]) -> None:
        self.settings = tuple(settings)
        self.names = [step.name for step in self.settings]
        table = RULES | CORPUS_WIDE
        self.steps: list[Rule | CorpusStep] = [table[s.name][0](s) for s in self.settings]
        self.corpus_wide: dict[int, CorpusStep] = {
            index: self.steps[index]  # type: ignore[misc]
            for index, name in enumerate(self.names)
            if name in CORPUS_WIDE
        }

    def fingerprint(self) -> list[dict[str, Any]]:
        """What the steps do: equal fingerprints promise equal results."""
        table = RULES | CORPUS_WIDE
        rows = []
        for settings, step in zip(self.settings, self.steps, strict=True):
            row = settings.model_dump(mode="json") | {"version": table[settings.name][1]}
            if isinstance(step, UserStep | Decontamination):
                row |= {"version": [row["version"], settings.model_dump().get("version", "")]}
                row |= {"content": step.fingerprint()}
            rows.append(row)
        return rows

    def apply(self, text: str, judge: Judge) -> Outcome:
        """Apply all steps to a text, until one leaves it out."""
        outcome = Outcome(text)
        for index, step in enumerate(self.steps):
            if index in self.corpus_wide:
                if judge(index, text):
                    return Outcome(None, index, self.corpus_wide[index].reason, outcome.changed)
                continue
            result = step(text)  # type: ignore[operator]
            if isinstance(result, Dropped):
                return Outcome(None, index, result.reason, outcome.changed)
            if result != text:
                if not result.strip():
                    return Outcome(None, index, EMPTY, outcome.changed)
                outcome.changed.append(index)
                text = result
        outcome.text = text
        return outcome

    def count(self, outcome: Outcome, counts: Counter[str]) -> None:
        """Add what happened to a document to `counts`, under keys that `tally` reads."""
        for index in outcome.changed:
            counts[f"cleaning {index + 1} {self.names[index]}: changed"] += 1
        if outcome.text is None:
            name = self.names[outcome.step]
            counts[f"cleaning {outcome.step + 1} {name}: removed, {outcome.reason}"] += 1


@dataclass
class StepCount:
    """Documents that a step removed and changed."""

    name: str
    removed: int = 0
    changed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Removed documents by reason, the commonest first."""


def tally(
    counts: Mapping[str, int], names: Sequence[str]
) -> tuple[dict[str, int], list[StepCount]]:
    """Divide counts into those that are not about cleaning and those of each step in `names`."""
    steps, others = [StepCount(name) for name in names], {}
    for key, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        match = COUNT.fullmatch(key)
        if match is None:
            others[key] = count
        elif match[4] is None:
            steps[int(match[1]) - 1].changed += count
        else:
            steps[int(match[1]) - 1].removed += count
            steps[int(match[1]) - 1].reasons[match[4]] = count
    return dict(sorted(others.items())), steps
