"""Text to tokens and back: characters, bytes, BPE, or any Hugging Face tokenizer.

A tokenizer is one JSON file, `tokenizer.json`, that travels with the prepared data, the run and
every checkpoint. Token ids are uint32 arrays. No text can produce a special token: a document that
contains the characters "<|endoftext|>" is encoded as these characters.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dtt.errors import DataError

Ids = NDArray[np.uint32]
END_OF_TEXT = "<|endoftext|>"
# Names under which published tokenizers have the token that ends a document.
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>", "<s>")
# GPT-2's pre-tokenizer. What needs no look-ahead stands in one group, which tiktoken's regular
# expressions then match without backtracking: the same matches, 1.4 times as fast.
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"
# A white-space character between two others. GPT-2's pre-tokenizer always cuts before one.
BETWEEN_WORDS = re.compile(r"(?<=\S)\s(?=\S)")
OWN = re.compile(r'\s*\{\s*"dtt"\s*:')
"""How the file of a kind of tokenizer that is dtt's own begins."""
SLICE = 1 << 18
"""Characters that `tokenizers` is given at a time: it needs about 160 bytes for each."""


class Tokenizer(Protocol):
    """Encodes text without loss where its alphabet allows, and decodes any ids of its own."""

    vocab_size: int
    """Number of token ids; every id is below it."""
    end_of_text: int
    """The id that separates documents."""
    unknown: int | None
    """The id of text outside of the alphabet; None where nothing is outside."""

    def encode(self, text: str) -> Ids: ...
    def decode(self, ids: Sequence[int] | Ids) -> str: ...
    def to_json(self) -> str: ...


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return a SHA-256: equal if and only if the files and the ends of text are equal."""
    text = f"{tokenizer.end_of_text} {tokenizer.to_json()}"
    return hashlib.sha256(text.encode()).hexdigest()


class CharTokenizer:
    """One token per character of a fixed alphabet; others become the token `unknown`."""

    end_of_text = 0
    unknown: int | None = 1

    def __init__(self, alphabet: Iterable[str]) -> None:
        self.alphabet = "".join(sorted(set(alphabet)))
        self.vocab_size = len(self.alphabet) + 2
        codes = _code_points(self.alphabet)
        self._table = np.full(int(codes.max(initial=0)) + 1, 1, dtype=np.uint32)
        self._table[codes] = np.arange(2, self.vocab_size, dtype=np.uint32)

    def encode(self, text: str) -> Ids:
        codes = _code_points(text)
        inside = codes < len(self._table)
        return np.where(inside, self._table[np.where(inside, codes, 0)], 1).astype(np.uint32)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        special = ("", "\N{REPLACEMENT CHARACTER}")
        return "".join(special[i] if i < 2 else self.alphabet[i - 2] for i in ids)

    def to_json(self) -> str:
        return _dump({"dtt": "char", "alphabet": self.alphabet})


class ByteTokenizer:
    """Token i is the byte i; 256 ends a document."""

    vocab_size = 257
    end_of_text = 256
    unknown: int | None = None

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.uint32)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", "replace")

    def to_json(self) -> str:
        return _dump({"dtt": "byte"})


class BpeTokenizer:
    """A Hugging Face `tokenizers` tokenizer.

    Byte-level BPE with GPT-2's pre-tokenizer is encoded by `tiktoken`, which gives the same tokens
    many times as fast (docs/benchmarks.md); every other kind by `tokenizers` itself, long texts
    in slices of SLICE characters cut between words.
    """

    def __init__(self, text: str, end_of_text: str | None = None, inner: Any = None) -> None:
        """`text` is a tokenizer.json; `inner` what `tokenizers` makes of it, if that is there."""
        if inner is None:
            from tokenizers import Tokenizer as HuggingFaceTokenizer

            inner = HuggingFaceTokenizer.from_str(text)
        self._json, self._inner = text, inner
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        names = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(names.values()) + 1
        self.end_of_text = _find_end(names, end_of_text)
        unknown = getattr(inner.model, "unk_token", None)
        self.unknown: int | None = names.get(unknown) if unknown else None

    @cached_property
    def _fast(self) -> Any | None:
        """The same tokenizer for tiktoken, made when it is first needed; None if there is none."""
        return _tiktoken_encoding(json.loads(self._json))

    def encode(self, text: str) -> Ids:
        if self._fast is not None:
            try:
                return self._encode_fast(text)
            except ValueError:  # a million blanks in a row: more than its stack holds
                return np.concatenate([self._encode_fast(part) for part in slices_of(text)])
        slices = (self._inner.encode(part, add_special_tokens=False) for part in slices_of(text))
        return np.concatenate([np.asarray(part.ids, dtype=np.uint32) for part in slices])

    def _encode_fast(self, text: str) -> Ids:
        encoding: Any = self._fast
        ids: Ids = encoding.encode_to_numpy(text, disallowed_special=())
        return ids

    def decode(self, ids: Sequence[int] | Ids) -> str:
        kept = [int(i) for i in ids if i < self.vocab_size]
        text: str = self._inner.decode(kept, skip_special_tokens=True)
        return text

    def to_json(self) -> str:
        return self._json


def train_bpe(
    documents: Iterator[str], vocab_size: int, special_tokens: Sequence[str]
) -> BpeTokenizer:
    """Train a byte-level BPE with GPT-2's pre-tokenizer; the same documents give the same file.

    Long documents are handed over in slices, which bounds memory and changes no word.
    """
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = HuggingFaceTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    slices = (part for document in documents for part in slices_of(document))
    inner.train_from_iterator(slices, trainer)
    return BpeTokenizer(inner.to_str(), special_tokens[0], inner)


def slices_of(text: str, size: int = SLICE) -> Iterator[str]:
    """Cut a text into slices of at least `size` characters, each before a space between words.

    Where none comes for as many characters again, the slice ends in the middle.
    """
    start = 0
    while len(text) - start > 2 * size:
        found = BETWEEN_WORDS.search(text, start + size, start + 2 * size)
        stop = found.start() if found else start + size
        yield text[start:stop]
        start = stop
    yield text[start:]


def named_end(settings: Mapping[str, Any]) -> str | None:
    """Return the name of the token that ends a document, if tokenizer settings say one."""
    special = settings.get("special_tokens")
    return special[0] if special else settings.get("end_of_text")


def parse_tokenizer(text: str, where: str, end_of_text: str | None = None) -> Tokenizer:
    """Return the tokenizer that `text`, the contents of the file `where`, describes."""
    try:
        return _parsed(text, end_of_text)
    except ValueError as error:
        raise DataError(
            f"{where} is not a tokenizer: {error}", "give a Hugging Face tokenizer.json"
        ) from None


@lru_cache(maxsize=4)
def _parsed(text: str, end_of_text: str | None) -> Tokenizer:
    """Half a second for 50,000 tokens, which preparing a corpus needs three times. ValueError if it
    is not one."""
    if OWN.match(text):
        data = json.loads(text)
        if data["dtt"] == "char" and isinstance(data.get("alphabet"), str):
            return CharTokenizer(data["alphabet"])
        if data["dtt"] == "byte":
            return ByteTokenizer()
    try:
        return BpeTokenizer(text, end_of_text)
    except DataError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception for every malformed file
        raise ValueError(_why_not(text) or str(error)) from None


def _why_not(text: str) -> str | None:
    try:
        data = json.loads(text)
    except ValueError:
        return "no valid JSON"
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        return "it has no `model`"
    return None


def load_tokenizer(path: Path, end_of_text: str | None = None) -> Tokenizer:
    """Load a tokenizer.json, or the one in the folder `path`."""
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"cannot read the tokenizer {file}: {error.strerror}", "check tokenizer.path"
        ) from None
    except UnicodeDecodeError:
        raise DataError(
            f"{file} is not a tokenizer: not UTF-8", "give a Hugging Face tokenizer.json"
        ) from None
    return parse_tokenizer(text, str(file), end_of_text)


def _find_end(names: dict[str, int], wanted: str | None) -> int:
    for name in [wanted] if wanted else KNOWN_ENDS:
        if name in names:
            return names[name]
    raise DataError(
        f"the tokenizer has no token {wanted or ' or '.join(KNOWN_ENDS)} that ends a document",
        "name one of its tokens with tokenizer.end_of_text",
    )


def _dump(data: dict[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False)


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def bytes_of_characters() -> dict[str, int]:
    """GPT-2's map from bytes to printable characters, inverted (openai/gpt-2, encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    rest = (b for b in range(256) if b not in set(printable))
    return table | {chr(256 + n): b for n, b in enumerate(rest)}


def _tiktoken_encoding(data: dict[str, Any]) -> Any | None:
    """Return the same tokenizer for tiktoken, or None if it cannot express it."""
    model, split = data["model"], data.get("pre_tokenizer") or {}
    plain = model.get("type") == "BPE" and not any(
        model.get(key)
        for key in ("dropout", "byte_fallback", "fuse_unk", "continuing_subword_prefix")
    )
    byte_level = split.get("type") == "ByteLevel" and split.get("use_regex", True)
    if not plain or not byte_level or split.get("add_prefix_space") or data.get("normalizer"):
        return None
    special = {token["content"] for token in data["added_tokens"]}
    names = {name: i for name, i in model["vocab"].items() if name not in special}
    # A character that stands for no byte becomes one that Latin-1 does not have.
    to_byte = dict.fromkeys(range(256), 256) | {ord(c): b for c, b in bytes_of_characters().items()}
    try:
        ranks = {name.translate(to_byte).encode("latin-1"): i for name, i in names.items()}
    except UnicodeEncodeError:
        return None
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    merged = [names.get(left + right, -1) for left, right in pairs]
    # tiktoken ranks a merge by the id of its result: ids must rise in the order of the merges.
    if len(ranks) - len(merged) != 256 or merged != sorted(merged) or -1 in merged:
        return None
    import tiktoken

    return tiktoken.Encoding("dtt", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
