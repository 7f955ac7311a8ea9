"""Settings of tokenizers, sources and how text is divided."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dtt.config.section import Section


class Char(Section):
    """One token per character that occurs in the training text."""

    name: Literal["char"] = "char"
    """Which tokenizer."""


class Byte(Section):
    """One token per byte: 256 tokens and the end of text."""

    name: Literal["byte"] = "byte"
    """Which tokenizer."""


class Bpe(Section):
    """A byte-level BPE trained on the training text (GPT-2's pre-tokenizer)."""

    name: Literal["bpe"] = "bpe"
    """Which tokenizer."""
    vocab_size: int = Field(1024, ge=257)
    """Number of tokens, the 256 bytes and the special tokens included."""
    special_tokens: Annotated[tuple[str, ...], Field(min_length=1)] = ("<|endoftext|>",)
    """Tokens that no text produces; the first one separates documents."""
    train_bytes: int = Field(100_000_000, gt=0)
    """Train on a seeded sample of at most this many bytes."""


class TokenizerFile(Section):
    """Any Hugging Face tokenizer.json."""

    name: Literal["file"] = "file"
    """Which tokenizer."""
    path: Path
    """A tokenizer.json, or a folder that holds one."""
    end_of_text: str | None = None
    """Token that separates documents; null: the first known one that the tokenizer has."""


Tokenizer = Annotated[Char | Byte | Bpe | TokenizerFile, Field(discriminator="name")]


class Tales(Section):
    """Short English stories from a grammar in the package, with known entropy."""

    name: Literal["tales"] = "tales"
    """Which source."""
    stories: int = Field(20_000, gt=0)
    """Number of stories, each a document of about half a kilobyte."""
    seed: int = Field(0, ge=0)
    """Which stories: the same seed always gives the same bytes."""


class Stdlib(Section):
    """The sources of this Python's standard library: tens of MB of code, no download."""

    name: Literal["stdlib"] = "stdlib"
    """Which source."""


class Text(Section):
    """Text files: a file, a folder (all files below it), a glob, or a list of these."""

    name: Literal["text"] = "text"
    """Which source."""
    path: Annotated[
        tuple[str, ...],
        Field(min_length=1, json_schema_extra={"type": ["array", "string"]}),
    ]
    """Files, folders or globs."""
    encoding: str = "utf-8"
    """Encoding of the files."""
    on_bad: Literal["error", "replace", "skip"] = "error"
    """Bytes that are not in this encoding: stop, put U+FFFD, or leave the document out."""
    separator: str | None = None
    """Text between two documents of a file, such as "\\n\\n"; null: a file is one document."""

    @model_validator(mode="before")
    @classmethod
    def _one_path_is_a_list(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("path"), str | Path):
            data = {**data, "path": (str(data["path"]),)}
        return data

    @model_validator(mode="after")
    def _known_encoding(self) -> Text:
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(f"unknown encoding {self.encoding!r}") from None
        if self.separator == "":
            raise ValueError("separator must not be empty (null: a file is one document)")
        return self


Source = Annotated[Tales | Stdlib | Text, Field(discriminator="name")]


class Data(Section):
    """Where text comes from, and how it is divided."""

    source: Source = Tales()
    """The corpus."""
    repeat: int = Field(1, ge=1)
    """Write the training text this many times (after the validation split), for tiny corpora."""
    val_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the corpus that is held out for validation."""
    split: Literal["auto", "documents", "tail"] = "auto"
    """Hold out whole documents (by hash), or the tail of the text; auto: documents from 20 on."""
    dir: Path = Path("data")
    """Prepared token shards go into a folder below this one, and are found there again."""
    workers: int = Field(0, ge=0)
    """Processes that encode text; 0: one per core."""
