"""Published rules that tell text worth learning from, without a model of a language.

Words are what stands between white space; the published filters use a tokenizer for English. Each
rule says in words which one was broken; the first one counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from dtt.config.cleaning import C4, FineWeb, Gopher, GopherRepetition, Length
from dtt.data.cleaning.ngrams import repeated_ngrams
from dtt.data.cleaning.step import Dropped

BLANK_LINES = re.compile(r"\n\s*\n")
# Of the scripts with most text on the web; and quotation marks, which end a line for C4 but not in
# datatrove's version of FineWeb's rules.
END_MARKS = (
    *"\"'”»….!?。｡؟।॥܀።፧",
    "\N{RIGHT SINGLE QUOTATION MARK}",
    "\N{FULLWIDTH EXCLAMATION MARK}",
    "\N{FULLWIDTH QUESTION MARK}",
    "\N{ARABIC FULL STOP}",
    "\N{ARMENIAN FULL STOP}",
)
C4_END_MARKS = (".", "?", "!", '"')
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
SENTENCE_END = re.compile(r"(?<![.!?])[.!?]+[\"'”\u2019)\]]*(?=\s|$)")
FIRST_TOP, FIRST_REPEATED = 2, 5
"""The n of the first threshold of `top_ngrams` and `repeated_ngrams`."""


class LengthLimits:
    """Leaves out what is too short or too long."""

    def __init__(self, settings: Length) -> None:
        self.settings = settings

    def __call__(self, text: str) -> str | Dropped:
        s = self.settings
        reason = _outside(len(text), s.min_characters, s.max_characters, "characters")
        if reason is None and (s.min_words is not None or s.max_words is not None):
            reason = _outside(len(text.split()), s.min_words, s.max_words, "words")
        return text if reason is None else Dropped(reason)


class GopherQuality:
    """The quality rules of Rae et al. 2021 (arXiv 2112.11446), A1.1."""

    def __init__(self, settings: Gopher) -> None:
        self.settings = settings
        self.stop_words = frozenset(word.lower() for word in settings.stop_words)

    def __call__(self, text: str) -> str | Dropped:
        reason = next(self._broken(text, text.split()), None)
        return text if reason is None else Dropped(reason)

    def _broken(self, text: str, words: list[str]) -> Iterator[str]:
        s, count = self.settings, len(words)
        yield from _reasons(_outside(count, s.min_words, s.max_words, "words"))
        if not words:
            yield from ["no words"] if s.min_words or s.min_word_length else []
            return
        mean = sum(map(len, words)) / count
        yield from _reasons(_outside(mean, s.min_word_length, s.max_word_length, "letters a word"))
        if s.max_symbols is not None:
            if text.count("#") / count > s.max_symbols:
                yield "too many hash signs"
            if _ellipses(text) / count > s.max_symbols:
                yield "too many ellipses"
        lines = [line.strip() for line in text.splitlines()]
        if _more(lines, s.max_bullets, lambda line: line.startswith(("•", "-", "*"))):
            yield "too many bullet points"
        if _more(lines, s.max_ellipses, lambda line: line.endswith(("...", "…"))):
            yield "too many lines end with an ellipsis"
        if s.min_alphabetic is not None:
            # Most text is done with whole words of letters; only the rest is looked into.
            enough = s.min_alphabetic * count
            if sum(map(str.isalpha, words)) < enough and sum(map(_lettered, words)) < enough:
                yield "too few words with letters"
        if s.min_stop_words:
            found = self.stop_words.intersection(words)
            if len(found) < s.min_stop_words:
                found = self.stop_words.intersection(map(str.lower, words))
            if len(found) < s.min_stop_words:
                yield "too few stop words"


class GopherRepetitions:
    """The repetition rules of Rae et al. 2021 (arXiv 2112.11446), table A1."""

    def __init__(self, settings: GopherRepetition) -> None:
        self.settings = settings

    def __call__(self, text: str) -> str | Dropped:
        reason = next(self._broken(text), None)
        return text if reason is None else Dropped(reason)

    def _broken(self, text: str) -> Iterator[str]:
        s, size = self.settings, max(len(text), 1)
        for kind, pieces, most, most_characters in (
            ("paragraphs", BLANK_LINES.split(text), s.max_paragraphs, s.max_paragraph_characters),
            ("lines", text.split("\n"), s.max_lines, s.max_line_characters),
        ):
            found = [stripped for piece in pieces if (stripped := piece.strip())]
            repeated = list(_repeated(found))
            if most is not None and len(repeated) > most * len(found):
                yield f"too many repeated {kind}"
            if most_characters is not None and sum(map(len, repeated)) / size > most_characters:
                yield f"too much text in repeated {kind}"
        top = dict(enumerate(s.top_ngrams, FIRST_TOP))
        repeated_most = dict(enumerate(s.repeated_ngrams, FIRST_REPEATED))
        for grams in repeated_ngrams(text.split(), max([1, *top, *repeated_most])):
            n = grams.n
            if n in top and grams.top() / size > top[n]:
                yield f"one {n}-gram makes up too much of it"
            if n in repeated_most and grams.repeated() / size > repeated_most[n]:
                yield f"too much text in repeated {n}-grams"


class C4Lines:
    """The rules of Raffel et al. 2020 (JMLR 21, 2.2), as their code has them (c4_utils.py of
    tensorflow_datasets); sentences are counted by their end marks instead of with NLTK."""

    def __init__(self, settings: C4) -> None:
        self.settings = settings

    def __call__(self, text: str) -> str | Dropped:
        settings, kept, sentences = self.settings, [], 0
        for raw in text.splitlines():
            line = self._line(raw.strip())
            if line is None:
                continue
            folded = line.lower()
            if settings.lorem_ipsum and "lorem ipsum" in folded:
                return Dropped("lorem ipsum")
            if settings.javascript and "javascript" in folded:
                continue
            if settings.braces and "{" in line:
                return Dropped("a brace")
            if settings.policies and any(words in folded for words in POLICIES):
                continue
            # A line that ends without a mark is a sentence too, when such lines are kept.
            sentences += max(1, sum(1 for _ in SENTENCE_END.finditer(line)))
            kept.append(line)
        if settings.min_sentences is not None and sentences < settings.min_sentences:
            return Dropped("too few sentences")
        return "\n".join(kept) if kept else Dropped("no line remains")

    def _line(self, line: str) -> str | None:
        """The line without citations, or None if its form is not that of a sentence."""
        s = self.settings
        longest = s.max_word_length
        if longest is not None and len(line) > longest and max(map(len, line.split())) > longest:
            return None
        if s.citations and "[" in line:
            line = CITATION.sub("", line)
        if s.terminal and (not line.endswith(C4_END_MARKS) or line.endswith("...")):
            return None
        if s.min_line_words is not None and len(line.split()) < s.min_line_words:
            return None
        return line or None


class FineWebQuality:
    """FineWeb's own rules (Penedo et al. 2024, arXiv 2406.17557, 3.6)."""

    def __init__(self, settings: FineWeb) -> None:
        self.settings = settings

    def __call__(self, text: str) -> str | Dropped:
        reason = next(self._broken(text), None)
        return text if reason is None else Dropped(reason)

    def _broken(self, text: str) -> Iterator[str]:
        s = self.settings
        lines = [line for line in text.split("\n") if line.strip()]
        if not lines:
            yield "no lines"
            return
        ended = sum(1 for line in lines if line.rstrip().endswith(END_MARKS)) / len(lines)
        if s.min_punctuated is not None and ended < s.min_punctuated:
            yield "too few lines end with punctuation"
        if _more(lines, s.max_short, lambda line: len(line) <= s.short_line):
            yield "too many short lines"
        if s.max_duplicated is not None:
            repeated = sum(map(len, _repeated(lines)))
            if repeated / max(len(text) - text.count("\n"), 1) > s.max_duplicated:
                yield "too much text in repeated lines"
        most = s.max_newlines
        if most is not None and text.count("\n") > most * max(len(text.split()), 1):
            yield "too many line feeds"


def _outside(value: float, least: float | None, most: float | None, what: str) -> str | None:
    if least is not None and value < least:
        return f"fewer than {least:g} {what}"
    if most is not None and value > most:
        return f"more than {most:g} {what}"
    return None


def _reasons(reason: str | None) -> list[str]:
    return [] if reason is None else [reason]


def _more(lines: Sequence[str], most: float | None, has: Callable[[str], bool]) -> bool:
    """Whether more than a share `most` of the lines has something."""
    return most is not None and sum(map(has, lines)) > most * len(lines)


def _lettered(word: str) -> bool:
    return any(map(str.isalpha, word))


def _ellipses(text: str) -> int:
    return text.count("...") + text.count("…")


def _repeated(items: Sequence[str]) -> Iterator[str]:
    """Yield each item that was there before."""
    seen: set[str] = set()
    for item in items:
        if item in seen:
            yield item
        seen.add(item)
