"""`dtt tokenizer compare`: tokenizers side by side on the same text."""

from __future__ import annotations

import codecs
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dtt.data.inspection.location import RUNS, corpora_named, find_corpora
from dtt.data.inspection.look import Look
from dtt.data.preparation.prepare import open_corpus
from dtt.errors import EXIT_DONE, ConfigError, DataError
from dtt.tokenizer import ByteTokenizer, CharTokenizer, Ids, Tokenizer, load_tokenizer

PIECE = 1 << 16
"""Bytes of a file that are encoded at once."""
_INSIDE = bytes(range(0x80, 0xC0))
"""Bytes that only occur inside of a UTF-8 character."""


class TiktokenTokenizer:
    """An encoding that `tiktoken` has by name, such as cl100k_base."""

    unknown: int | None = None

    def __init__(self, name: str) -> None:
        import tiktoken

        try:
            self._inner = tiktoken.get_encoding(name)
        except Exception as error:  # it downloads with whatever errors its client raises
            raise DataError(
                f"the tiktoken encoding {name} is not in its cache and could not be downloaded "
                f"({type(error).__name__})",
                "set TIKTOKEN_CACHE_DIR to a folder that has it",
            ) from None
        self.vocab_size = self._inner.n_vocab
        self.end_of_text = self._inner.eot_token

    def encode(self, text: str) -> Ids:
        ids: Ids = self._inner.encode_to_numpy(text, disallowed_special=())
        return ids

    def decode(self, ids: Sequence[int] | Ids) -> str:
        text: str = self._inner.decode([int(i) for i in ids])
        return text

    def to_json(self) -> str:
        return json.dumps({"tiktoken": self._inner.name})


@dataclass(frozen=True)
class Compared:
    """A tokenizer's figures on a text."""

    name: str
    vocab_size: int
    tokens: int
    bytes_per_token: float
    vocabulary_used: int
    """Different tokens that the text needs."""
    megabytes_per_second: float
    """Of encoding, on one core, after a first document."""
    changed: int
    """Documents that decoding does not give back exactly."""
    unknown_share: float
    """Of the tokens."""


def compare(name: str, tokenizer: Tokenizer, texts: Sequence[str]) -> Compared:
    """Encode and decode every text, and measure."""
    tokenizer.encode(texts[0][:1000])
    begun = time.perf_counter()
    encoded = [tokenizer.encode(text) for text in texts]
    seconds = time.perf_counter() - begun
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    tokens = sum(len(ids) for ids in encoded)
    used = np.unique(np.concatenate(encoded))
    unknown = tokenizer.unknown
    return Compared(
        name=name,
        vocab_size=tokenizer.vocab_size,
        tokens=tokens,
        bytes_per_token=size / max(tokens, 1),
        vocabulary_used=len(used),
        megabytes_per_second=size / 1e6 / max(seconds, 1e-9),
        changed=sum(
            tokenizer.decode(ids) != text for ids, text in zip(encoded, texts, strict=True)
        ),
        unknown_share=(
            sum(int((ids == unknown).sum()) for ids in encoded) / max(tokens, 1)
            if unknown is not None
            else 0.0
        ),
    )


def open_tokenizer(name: str, texts: Sequence[str]) -> Tokenizer:
    """Return the tokenizer that `name` says: char, byte, a tokenizer.json, a folder that holds one
    (a prepared corpus, a run), a name below data/ or runs/, or an encoding of tiktoken."""
    import tiktoken

    if name == "char":
        return CharTokenizer(set().union(*texts))
    if name == "byte":
        return ByteTokenizer()
    below = corpora_named(name)
    for path in [Path(name), *(below if len(below) == 1 else ()), RUNS / name]:
        file = path / "tokenizer.json" if path.is_dir() else path
        if file.is_file():
            if (file.parent / "manifest.json").is_file():
                return open_corpus(file.parent).tokenizer
            return load_tokenizer(file)
    if name in tiktoken.list_encoding_names():
        return TiktokenTokenizer(name)
    known = ", ".join(tiktoken.list_encoding_names())
    raise DataError(
        f"{name} is not a tokenizer: no tokenizer.json there, and not char, byte or an encoding of "
        "tiktoken",
        f"give a file, a prepared corpus, a run, char, byte or one of {known}",
    )


def read_texts(
    name: str, split: str, most: int, source: str | None = None
) -> tuple[str, list[str]]:
    """Return what is read, and texts of together at most `most` bytes: pieces of a text file, or
    documents of a prepared corpus (of a mixture: the one called `source`), spread evenly over all
    of it."""
    path = Path(name)
    if path.is_file():
        if source is not None:
            raise ConfigError(f"--source {source}: {path} is a text file", "leave --source out")
        texts = list(_file_pieces(path, most))
        what = f"{path}"
    else:
        corpus = find_corpora(name).corpus(source)
        corpus.verify(split)
        texts, what = list(_documents(Look(corpus, split), most)), f"{corpus.folder}, {split}"
    if not any(texts):
        raise DataError(
            f"{name} has no text",
            f"give a text file or a prepared corpus, or more --max-bytes than {most:,}",
        )
    return what, texts


def _file_pieces(path: Path, most: int) -> Iterator[str]:
    size = path.stat().st_size
    length = min(PIECE, most)
    pieces = -(-size // length)
    wanted = min(pieces, most // length)
    with path.open("rb") as file:
        for place in range(wanted):
            start = pieces * place // wanted * length
            file.seek(start)
            raw = file.read(length)
            # A character that the beginning or the end of the piece cuts is left out.
            cut = len(raw) - len(raw[:3].lstrip(_INSIDE) + raw[3:]) if start else 0
            try:
                whole = start + length >= size
                text, _ = codecs.utf_8_decode(raw[cut:], "strict", whole)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: byte {start + cut + error.start} (0x{raw[cut + error.start]:02x}) "
                    "is not utf-8",
                    "give a text file in UTF-8",
                ) from None
            if text:
                yield text


def _documents(look: Look, most: int) -> Iterator[str]:
    """Documents in evenly spaced order until `most` bytes; the last one is cut there."""
    count = len(look.index)
    mean = max(1, look.corpus.manifest.total(look.split, "bytes") // max(1, count))
    wanted, left = min(count, max(1, most // mean)), most
    for place in range(wanted):
        text = ""
        for piece in look.document(count * place // wanted):
            text += piece
            if len(text) >= left:
                break
        utf8 = text.encode("utf-8", "replace")
        if cut := utf8[:left].decode("utf-8", "ignore"):
            yield cut
        left -= len(utf8)
        if left <= 0:
            return


def compare_command(
    *,
    names: list[str],
    on: str,
    split: str,
    source: str | None,
    max_bytes: int,
    json_line: bool,
) -> int:
    """Print a line for each tokenizer; return the exit code."""
    if len(set(names)) < len(names):
        raise ConfigError("the same tokenizer is named twice")
    what, texts = read_texts(on, split, max_bytes, source)
    found = [compare(name, open_tokenizer(name, texts), texts) for name in names]
    if json_line:
        for row in found:
            print(json.dumps({"on": what} | asdict(row), ensure_ascii=False))
        return EXIT_DONE
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    print(f"{what}: {size:,} bytes in {len(texts):,} texts")
    width = max(len(row.name) for row in found)
    head = ("vocabulary", "used", "tokens", "bytes/token", "MB/s", "round trip", "unknown")
    print(" " * width + "".join(f"{name:>13}" for name in head))
    for row in found:
        print(f"{row.name:<{width}}" + "".join(f"{cell:>13}" for cell in _cells(row, len(texts))))
    if "char" in names:
        print("char: made from this very text, so it knows all its characters")
    return EXIT_DONE


def _cells(row: Compared, texts: int) -> tuple[Any, ...]:
    return (
        f"{row.vocab_size:,}",
        f"{row.vocabulary_used:,}",
        f"{row.tokens:,}",
        f"{row.bytes_per_token:.3f}",
        f"{row.megabytes_per_second:.1f}",
        "exact" if not row.changed else f"{row.changed:,} differ",
        f"{row.unknown_share:.3%}" if row.unknown_share else "none",
    )
