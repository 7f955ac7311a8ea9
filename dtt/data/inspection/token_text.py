"""The text of single tokens: what shows their boundaries, and what makes search fast.

A byte-level token is bytes, not text: it may end inside a character. Its bytes joined in order are
the document's bytes, so a block of tokens becomes text by one gather in numpy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dtt.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    Ids,
    Tokenizer,
    bytes_of_characters,
)

END = b"\xff"
"""Stands for the end of a document in joined text: a byte that UTF-8 never has."""
TAIL = 8
"""Tokens before one that may change how it is decoded, where tokens are not bytes."""
# Controls and the characters that reorder text (Unicode Bidi) would act on a terminal.
_HIDDEN = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"
} | {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def token_bytes(tokenizer: Tokenizer) -> list[bytes] | None:
    """Return the bytes of every token; None where a token's text depends on its neighbours.

    Special tokens have none. For `tokenizers` this is so where the decoder is ByteLevel.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return [bytes([i]) for i in range(256)] + [b""]
    if isinstance(tokenizer, CharTokenizer):
        characters = (char.encode("utf-8", "surrogatepass") for char in tokenizer.alphabet)
        return [b"", "\N{REPLACEMENT CHARACTER}".encode(), *characters]
    data = json.loads(tokenizer.to_json())
    vocabulary = data["model"].get("vocab")
    if (data.get("decoder") or {}).get("type") != "ByteLevel" or not isinstance(vocabulary, dict):
        return None
    of_char, found = bytes_of_characters(), [b""] * tokenizer.vocab_size
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    for name, index in (vocabulary | added).items():
        known = all(char in of_char for char in name)
        found[index] = bytes(of_char[char] for char in name) if known else name.encode()
    for token in data["added_tokens"]:
        if token["special"]:
            found[token["id"]] = b""
    return found


class JoinedText:
    """Turns arrays of byte-level tokens into bytes, about a hundred times as fast as a decoder."""

    def __init__(self, pieces: Sequence[bytes], end_of_text: int) -> None:
        """`end_of_text` becomes `END`."""
        pieces = [*pieces[:end_of_text], END, *pieces[end_of_text + 1 :]]
        self._lengths = np.array([len(piece) for piece in pieces], np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._flat = np.frombuffer(b"".join(pieces), np.uint8)

    def join(self, ids: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
        """Return the bytes of the tokens, and where in them each token stops."""
        lengths = self._lengths[ids]
        stops = np.cumsum(lengths)
        shift = np.repeat(self._starts[ids] - (stops - lengths), lengths)
        return self._flat[np.arange(len(shift)) + shift].tobytes(), stops


def token_texts(tokenizer: Tokenizer, ids: Sequence[int] | Ids) -> Iterator[str]:
    """Yield the text of each token as it stands in this sequence.

    Bytes that are not a whole character are written \\xe2; the end of text is "".
    """
    pieces = token_bytes(tokenizer)
    for place, token in enumerate(ids):
        if pieces is not None:
            yield pieces[token].decode("utf-8", "backslashreplace")
        else:
            before = ids[max(0, place - TAIL) : place]
            yield tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :]


def printable(text: str) -> str:
    """Return `text` with what would act on a terminal written out, such as \\x1b."""
    return text.translate(_HIDDEN)
