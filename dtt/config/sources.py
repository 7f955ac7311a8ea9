"""Settings of sources: where documents come from."""

from __future__ import annotations

import codecs
import string
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from dtt.config.remote import Hub, Url
from dtt.config.section import Section

RECORDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Formats of rows by the ending of a file's name."""
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
"""Endings behind the format's, as in .jsonl.gz."""

DATA_SET_FILES = ("state.json", "dataset_dict.json")
"""What a folder has that Hugging Face `datasets` saved."""


def record_format(name: str) -> str | None:
    """Return the format of rows that a file's name says, or None."""
    name = name.lower()
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return RECORDS.get(Path(name).suffix)


def _as_tuple(value: Any) -> Any:
    return (str(value),) if isinstance(value, str | Path) else value


Paths = Annotated[
    tuple[str, ...],
    BeforeValidator(_as_tuple),
    Field(min_length=1, json_schema_extra={"type": ["array", "string"]}),
]
"""One path or several."""
OnBad = Literal["error", "replace", "skip"]


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
    """Text files, plain or .gz, .zst, .bz2, .xz: a file, a folder, a glob, or a list of these."""

    name: Literal["text"] = "text"
    """Which source."""
    path: Paths
    """Files, folders (all files below) or globs, here or remote (s3://, https://, ...)."""
    encoding: str = "utf-8"
    """Encoding of the files."""
    on_bad: OnBad = "error"
    """Bytes that are not in this encoding, or NUL: stop, put U+FFFD, or leave the document out."""
    separator: str | None = None
    """Text between two documents of a file, such as "\\n\\n"; null: a file is one document."""

    @model_validator(mode="after")
    def _known_encoding(self) -> Text:
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(f"unknown encoding {self.encoding!r}") from None
        if self.separator == "":
            raise ValueError("separator must not be empty (null: a file is one document)")
        return self


class Records(Section):
    """Rows of JSON lines (plain or compressed), Parquet, or a Hugging Face data set on disk."""

    name: Literal["records"] = "records"
    """Which source."""
    path: Paths
    """Files, folders (all files of these formats below) or globs, here or remote."""
    format: Literal["auto", "jsonl", "parquet", "arrow"] = "auto"
    """Format of the files; auto: by the ending of each file's name."""
    field: str = "text"
    """The field of a row that is its text; a dot enters a nested one (meta.title)."""
    template: str | None = None
    """Text made of several fields, such as "{title}\\n\\n{text}", instead of `field`."""
    on_bad: OnBad = "error"
    """Rows without usable text: stop, repair what can be repaired, or leave the row out."""

    @model_validator(mode="after")
    def _one_way_to_the_text(self) -> Records:
        if not self.field:
            raise ValueError("field must not be empty")
        if self.template is None:
            return self
        if self.field != "text":
            raise ValueError("give field or template, not both")
        try:
            names = [part[1:] for part in string.Formatter().parse(self.template)]
        except ValueError as error:
            raise ValueError(f"template {self.template!r}: {error}") from None
        if any(name == "" or form or change for name, form, change in names):
            raise ValueError(f"template {self.template!r}: only plain {{field}} names")
        if not any(name for name, _, _ in names):
            raise ValueError(f"template {self.template!r} names no {{field}}")
        return self


Source = Annotated[Tales | Stdlib | Text | Records | Hub | Url, Field(discriminator="name")]


def source_label(source: Source) -> str:
    """Return what people call the corpus: the name of its first file or data set."""
    match source:
        case Text() | Records():
            return Path(source.path[0]).stem
        case Hub():
            return Path(source.dataset).name
        case Url():
            return Path(urlsplit(source.urls[0]).path).stem
    return source.name
