"""Settings of the cleaning steps: what is done to documents before they become tokens.

The steps of `data.cleaning` are applied in their order. A threshold of null turns its rule off.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dtt.config.section import Section


class Unicode(Section):
    """One way to write the same text: composed characters, line feeds, no control characters."""

    name: Literal["unicode"] = "unicode"
    """Which step."""
    form: Literal["NFC", "NFKC", "NFD", "NFKD"] | None = "NFC"
    """Unicode normalisation form (UAX 15); null: none."""
    newlines: bool = True
    """Write CR LF, CR, NEL and the line and paragraph separators as a line feed."""
    control: bool = True
    """Take out control characters but tab and line feed, byte-order marks and lone surrogates."""


class Length(Section):
    """Leave out documents that are too short or too long."""

    name: Literal["length"] = "length"
    """Which step."""
    min_characters: int | None = Field(None, gt=0)
    """Fewest characters."""
    max_characters: int | None = Field(None, gt=0)
    """Most characters."""
    min_words: int | None = Field(None, gt=0)
    """Fewest words (between white space)."""
    max_words: int | None = Field(None, gt=0)
    """Most words."""

    @model_validator(mode="after")
    def _some_limit(self) -> Length:
        for kind in ("characters", "words"):
            least, most = getattr(self, f"min_{kind}"), getattr(self, f"max_{kind}")
            if least is not None and most is not None and least > most:
                raise ValueError(f"min_{kind} ({least}) is more than max_{kind} ({most})")
        if not self.model_dump(exclude={"name"}, exclude_none=True):
            raise ValueError("the step length has no limit; set min_words or another one")
        return self


class Gopher(Section):
    """Quality rules of Gopher (Rae et al. 2021, A1.1); words stand between white space."""

    name: Literal["gopher"] = "gopher"
    """Which step."""
    min_words: int | None = Field(50, gt=0)
    """Fewest words."""
    max_words: int | None = Field(100_000, gt=0)
    """Most words."""
    min_word_length: float | None = Field(3, gt=0)
    """Least mean length of words, in characters."""
    max_word_length: float | None = Field(10, gt=0)
    """Largest mean length of words, in characters."""
    max_symbols: float | None = Field(0.1, gt=0)
    """Most hash signs per word, and most ellipses per word."""
    max_bullets: float | None = Field(0.9, gt=0)
    """Largest share of lines that begin with a bullet point."""
    max_ellipses: float | None = Field(0.3, gt=0)
    """Largest share of lines that end with an ellipsis."""
    min_alphabetic: float | None = Field(0.8, gt=0, le=1)
    """Least share of words with a letter in them."""
    min_stop_words: int = Field(2, ge=0)
    """So many of `stop_words` must occur; 0 for text that is not English."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    """Words of which some must occur."""


class GopherRepetition(Section):
    """Repetition rules of Gopher (Rae et al. 2021, table A1); shares of all characters."""

    name: Literal["gopher-repetition"] = "gopher-repetition"
    """Which step."""
    max_lines: float | None = Field(0.3, gt=0)
    """Largest share of lines that were there before."""
    max_line_characters: float | None = Field(0.2, gt=0)
    """Largest share of characters in such lines."""
    max_paragraphs: float | None = Field(0.3, gt=0)
    """Largest share of paragraphs (between blank lines) that were there before."""
    max_paragraph_characters: float | None = Field(0.2, gt=0)
    """Largest share of characters in such paragraphs."""
    top_ngrams: tuple[float, ...] = (0.20, 0.18, 0.16)
    """Largest share of the commonest n-gram's characters, for n of 2, 3, ...; empty: no rule."""
    repeated_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    """Largest share of characters in n-grams that were there before, for n of 5, 6, ..."""


class C4(Section):
    """Rules of C4 (Raffel et al. 2020, 2.2, and its code): keeps sentences, line by line."""

    name: Literal["c4"] = "c4"
    """Which step."""
    terminal: bool = True
    """Leave out lines that do not end with a full stop, ?, ! or a quotation mark."""
    min_line_words: int | None = Field(5, gt=0)
    """Leave out lines with fewer words."""
    max_word_length: int | None = Field(1000, gt=0)
    """Leave out lines with a longer word, in characters."""
    min_sentences: int | None = Field(3, gt=0)
    """Leave out documents with fewer sentences in the lines that remain."""
    javascript: bool = True
    """Leave out lines that say javascript."""
    policies: bool = True
    """Leave out lines on cookies, terms of use and privacy."""
    citations: bool = True
    """Take out marks such as [1], [edit] and [citation needed]."""
    lorem_ipsum: bool = True
    """Leave out documents with "lorem ipsum"."""
    braces: bool = True
    """Leave out documents with a { in them: programs."""


class FineWeb(Section):
    """FineWeb's own rules (Penedo et al. 2024, 3.6); lines are those that are not blank."""

    name: Literal["fineweb"] = "fineweb"
    """Which step."""
    min_punctuated: float | None = Field(0.12, gt=0, le=1)
    """Least share of lines that end with punctuation."""
    max_duplicated: float | None = Field(0.1, gt=0)
    """Largest share of characters in lines that were there before (datatrove's default: 0.01)."""
    short_line: int = Field(30, gt=0)
    """A line of at most so many characters is short."""
    max_short: float | None = Field(0.67, gt=0)
    """Largest share of short lines."""
    max_newlines: float | None = Field(None, gt=0)
    """Most line feeds per word (datatrove's filter has 0.3, the paper has no such rule)."""


def _compiled(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, Field(min_length=1), BeforeValidator(_compiled)]


class RegexDrop(Section):
    """Leave out documents in which a regular expression (Python's `re`) occurs."""

    name: Literal["regex-drop"] = "regex-drop"
    """Which step."""
    pattern: Pattern
    """What must not occur; (?i) at its start ignores case, (?m) makes ^ and $ those of lines."""
    matches: int = Field(1, gt=0)
    """How often it has to occur."""


class RegexReplace(Section):
    """Put a text in the place of each match of a regular expression (Python's `re`)."""

    name: Literal["regex-replace"] = "regex-replace"
    """Which step."""
    pattern: Pattern
    """What is replaced."""
    replacement: str = ""
    """What comes there; \\\\1 is the first group."""

    @model_validator(mode="after")
    def _groups_exist(self) -> RegexReplace:
        try:
            re.compile(self.pattern).sub(self.replacement, "")
        except (re.error, IndexError) as error:
            raise ValueError(f"replacement {self.replacement!r}: {error}") from None
        return self


class Pii(Section):
    """Mask e-mail and IP addresses."""

    name: Literal["pii"] = "pii"
    """Which step."""
    email: str | None = "email@example.com"
    """What stands for an e-mail address (a reserved one, RFC 2606); null: they stay."""
    ip: str | None = "192.0.2.1"
    """What stands for an IPv4 or IPv6 address (a reserved one, RFC 5737); null: they stay."""
    public_only: bool = True
    """Leave addresses of private, local and reserved networks as they are."""


class ExactDedup(Section):
    """Leave out documents that were there before, character by character."""

    name: Literal["exact-dedup"] = "exact-dedup"
    """Which step."""
    fold: bool = False
    """Compare without regard to case, white space and punctuation."""


class NearDedup(Section):
    """Leave out documents much like an earlier one: MinHash with LSH (needs dtt[data])."""

    name: Literal["near-dedup"] = "near-dedup"
    """Which step."""
    ngram: int = Field(5, gt=0)
    """Documents are compared as sets of so many words in a row."""
    bands: int = Field(14, gt=0, le=1000)
    """Two documents are candidates if all hashes of one of so many bands agree ..."""
    rows: int = Field(8, gt=0, le=100)
    """... of so many hashes each: with similarity s in 1 - (1 - s^rows)^bands of all cases."""
    similarity: float | None = Field(0.7, gt=0, le=1)
    """Candidates also need this estimated Jaccard similarity; null: as datatrove, no such check."""
    seed: int = Field(1, ge=0, lt=2**32)
    """Seed of the hashes."""


class Decontaminate(Section):
    """Leave out documents that share n words in a row with evaluation texts."""

    name: Literal["decontaminate"] = "decontaminate"
    """Which step."""
    path: Annotated[
        tuple[str, ...],
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
        Field(min_length=1, json_schema_extra={"type": ["array", "string"]}),
    ]
    """Evaluation texts: files, folders or globs; of .jsonl files, every text in every row."""
    ngram: int = Field(13, gt=0)
    """So many words in a row (GPT-3: 13, Brown et al. 2020, C), without case and punctuation."""
    shortest: int = Field(8, gt=0)
    """A text with fewer words than `ngram` counts whole if it has at least so many."""
    separator: str | None = None
    """Text between two evaluation texts in a file, such as "\\n"; null: a file is one text."""


class UserFunction(Section):
    """A function of your own: text -> text, or None to leave the document out."""

    name: Literal["user"] = "user"
    """Which step."""
    function: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """module:function; the module is installed, or in the folder where dtt is started."""
    version: str = ""
    """Change it when the function changes what it does by something outside its own file."""


def _or_its_name(schema: dict[str, Any]) -> None:
    schema["oneOf"].append({"enum": list(schema["discriminator"]["mapping"])})


def _named(step: Any) -> Any:
    """A step that is only named has its defaults."""
    return {"name": step} if isinstance(step, str) else step


Step = Annotated[
    Unicode
    | Length
    | Gopher
    | GopherRepetition
    | C4
    | FineWeb
    | RegexDrop
    | RegexReplace
    | Pii
    | ExactDedup
    | NearDedup
    | Decontaminate
    | UserFunction,
    Field(discriminator="name", json_schema_extra=_or_its_name),
    BeforeValidator(_named),
]
