"""Settings of sources that are downloaded first: data sets of the Hugging Face Hub, and URLs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from dtt.config.section import Section

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _bytes(value: Any) -> Any:
    """A number of bytes from 500MB, 2G or 1.5e9; anything else is left for validation."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", value) if _is_text(value) else None
    return int(float(match[1]) * UNITS[match[2]]) if match else value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _listed(data: Any, *names: str) -> Any:
    """`data` with a single text made a list in the settings of these names."""
    if not isinstance(data, dict):
        return data
    return {
        k: (str(v),) if k in names and isinstance(v, str | Path) else v for k, v in data.items()
    }


Texts = Annotated[tuple[str, ...], Field(json_schema_extra={"type": ["array", "string"]})]
Bytes = Annotated[
    Annotated[int, Field(gt=0)] | None,
    BeforeValidator(_bytes),
    Field(json_schema_extra={"type": ["integer", "string", "null"]}),
]


class Remote(Section):
    """What a download and the reading of its files have in common."""

    name: str
    """Which source."""
    field: str = "text"
    """The field of a row that is its text; a dot enters a nested one (meta.title)."""
    template: str | None = None
    """Text made of several fields, such as "{title}\\n\\n{text}", instead of `field`."""
    separator: str | None = None
    """Text between two documents of a file, such as "\\n\\n"; null: a file is one document."""
    on_bad: Literal["error", "replace", "skip"] = "error"
    """Rows without usable text: stop, repair what can be repaired, or leave the row out."""
    max_documents: int | None = Field(None, gt=0)
    """Only so many documents, the first ones; no more than they need is downloaded."""
    max_bytes: Bytes = None
    """Only the first files, as many as have together at most so many bytes (500MB, 2G)."""
    connections: int = Field(4, gt=0, le=64)
    """Files that are downloaded at the same time."""
    offline: bool = False
    """Never use the network: what is not here is an error (as with HF_HUB_OFFLINE=1)."""

    @model_validator(mode="after")
    def _readable(self) -> Remote:
        from dtt.config.sources import Records, Text  # which has this module's sections in a union

        try:
            Records(path=("-",), template=self.template)
            Text(path=("-",), separator=self.separator)
        except ValidationError as error:
            problem = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(problem) from None
        return self


class Hub(Remote):
    """A data set of the Hugging Face Hub, downloaded once."""

    name: Literal["hub"] = "hub"
    """Which source."""
    dataset: Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")]
    """Its name there, such as roneneldan/TinyStories."""
    config: str | None = None
    """Its configuration (subset), such as sample-10BT; null: the default one."""
    split: str = "train"
    """Its split."""
    revision: str = "main"
    """Branch, tag or commit."""
    files: Texts = ()
    """Files or globs in its repository, such as data/*.jsonl.gz, instead of config and split."""

    @model_validator(mode="before")
    @classmethod
    def _one_file_is_a_list(cls, data: Any) -> Any:
        return _listed(data, "files")


class Url(Remote):
    """Files at http(s) addresses, downloaded once."""

    name: Literal["url"] = "url"
    """Which source."""
    urls: Annotated[Texts, Field(min_length=1)]
    """Addresses of the files."""
    sha256: Texts = ()
    """SHA-256 of each file in hexadecimal, in the order of `urls`; an empty list: not checked."""

    @model_validator(mode="before")
    @classmethod
    def _one_url_is_a_list(cls, data: Any) -> Any:
        return _listed(data, "urls", "sha256")

    @model_validator(mode="after")
    def _sound(self) -> Url:
        for url in self.urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"urls: should be http or https addresses, got {url!r}")
            if "@" in parts.netloc:
                raise ValueError("urls: a password in an address would be saved with the run")
        if len(self.sha256) not in (0, len(self.urls)):
            raise ValueError(f"{len(self.urls)} urls need as many sha256, not {len(self.sha256)}")
        for digest in self.sha256:
            if not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise ValueError(f"sha256: should be 64 hexadecimal digits, got {digest!r}")
        return self
