"""dtt's tokenizers as the files that `transformers` reads, proven to give the same tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtt.generation import REPLACEMENT, encode_prompt
from dtt.model.hf.quiet import quiet
from dtt.tokenizer import (
    END_OF_TEXT,
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    bytes_of_characters,
)

HOSTILE = (
    "",
    " ",
    "  two  spaces ",
    "\n\n\t\r\n \x0b",
    "Once upon a time, there was a cat.",
    "it's 'quoted', isn't it?",
    "1234567890 3.14159 1,000,000",
    f"before{END_OF_TEXT}after",
    "<s> </s> [UNK] <unk> <pad> <|im_end|>",
    "naïve café Ünïcödé e\u0301",
    "日本語のテキスト 한국어 العربية עברית",
    "emoji 👩‍👩‍👧 and 🏳️‍🌈 flags",
    "zero\u200bwidth\ufeffand\u00a0spaces",
    "\x00\x01\x7f control",
    "replacement \ufffd character",
    "x" * 500 + " " * 50 + "y" * 3,
    "def f(x):\n    return x ** 2  # code\n",
)
"""Texts that tokenizers are compared on."""
UNKNOWN = "<|unknown|>"


def tokenizer_files(tokenizer: Tokenizer, own: bool, context: int) -> Mapping[str, str]:
    """Return tokenizer.json, tokenizer_config.json and special_tokens_map.json by name.

    With `own`, the tokenizer was made by dtt: then a text begins with the token that documents
    begin with, as in training, and no text can produce a special token. Without, it is a published
    one, which stays as it is.
    """
    data, end = _tokenizers_json(tokenizer)
    special = {"bos_token": end, "eos_token": end, "pad_token": end}
    if own:
        data["post_processor"] = _begin(end, tokenizer.end_of_text)
    if tokenizer.unknown is not None:
        special["unk_token"] = _name_of(data, tokenizer.unknown)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if own:
        config["split_special_tokens"] = True
    return {
        "tokenizer.json": json.dumps(data, ensure_ascii=False) if own else tokenizer.to_json(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2, ensure_ascii=False) + "\n",
    }


def _tokenizers_json(tokenizer: Tokenizer) -> tuple[dict[str, Any], str]:
    """Return the contents of a tokenizer.json of `tokenizers`, and the name of the end of text."""
    if isinstance(tokenizer, CharTokenizer):
        unknown = UNKNOWN if REPLACEMENT in tokenizer.alphabet else REPLACEMENT
        names = [END_OF_TEXT, unknown, *tokenizer.alphabet]
        fuse = {"type": "Fuse"}
        return _without_merges(names, {0: END_OF_TEXT, 1: unknown}, None, fuse, unknown), names[0]
    if isinstance(tokenizer, ByteTokenizer):
        characters = {byte: char for char, byte in bytes_of_characters().items()}
        names = [*(characters[byte] for byte in range(256)), END_OF_TEXT]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        split = {**level, "use_regex": False}
        return _without_merges(names, {256: END_OF_TEXT}, split, split, None), END_OF_TEXT
    data = json.loads(tokenizer.to_json())
    return data, _name_of(data, tokenizer.end_of_text)


def _without_merges(
    names: list[str],
    special: dict[int, str],
    split: dict[str, Any] | None,
    decoder: dict[str, Any],
    unknown: str | None,
) -> dict[str, Any]:
    """A BPE that never merges: each character is a token, whatever stands beside it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": name, **flags, "special": True} for id, name in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {name: id for id, name in enumerate(names)},
            "merges": [],
        },
    }


def _begin(name: str, id: int) -> dict[str, Any]:
    """A text begins with the token that separates documents."""
    first = {"SpecialToken": {"id": name, "type_id": 0}}
    parts = [{"Sequence": {"id": which, "type_id": 0}} for which in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [first, parts[0]],
        "pair": [first, parts[0], first, parts[1]],
        "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]}},
    }


def _name_of(data: dict[str, Any], wanted: int) -> str:
    added = {token["id"]: token["content"] for token in data["added_tokens"]}
    if wanted in added:
        return str(added[wanted])
    vocabulary = data["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [[name, score], ...]
        return str(vocabulary[wanted][0])
    return str(next(name for name, id in vocabulary.items() if id == wanted))


def first_difference(folder: Path, tokenizer: Tokenizer, own: bool) -> str | None:
    """Return how the tokenizer that `transformers` loads from `folder` differs from ours, on
    HOSTILE texts and on the names of special tokens; None: it does not."""
    import transformers

    with quiet():  # of texts that are longer than the context
        return _first_difference(transformers.AutoTokenizer, folder, tokenizer, own)


def _first_difference(loader: Any, folder: Path, tokenizer: Tokenizer, own: bool) -> str | None:
    try:
        theirs = loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever it raises for a tokenizer that it does not know
        return f"it cannot load it ({' '.join(str(error).split())[:300]})"
    special = set(theirs.all_special_tokens) | set(theirs.get_added_vocab())
    for text in (*HOSTILE, *sorted(special)):
        if not own and any(name in text for name in special):
            continue  # published tokenizers read the names of special tokens as these
        expected = tokenizer.encode(text).tolist()
        found = theirs(text, add_special_tokens=False)["input_ids"]
        if found != expected:
            return f"{text[:40]!r} is {found[:8]} there and {expected[:8]} here"
        if own and theirs(text)["input_ids"] != encode_prompt(tokenizer, text):
            return f"{text[:40]!r} does not begin with the token that documents begin with"
        # Decoding is compared only where it must give the text back.
        if isinstance(tokenizer, BpeTokenizer | ByteTokenizer) and own:
            back = theirs.decode(found, skip_special_tokens=True)
            if back != tokenizer.decode(expected):
                return f"{text[:40]!r} is decoded as {back[:40]!r}"
    return None
