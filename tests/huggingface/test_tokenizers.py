"""Tokenizers in transformers: the tokens of dtt for every text, also for one that means harm."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dtt.generation import encode_prompt
from dtt.huggingface.tokenizers import HOSTILE, first_difference, tokenizer_files
from dtt.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer, train_bpe

transformers = pytest.importorskip("transformers")

TEXT = "Once upon a time, the cat's naïve friend said: “Hello!”\n\n  It was 1999. \u3042\U0001f600"
TOKENIZERS: dict[str, Tokenizer] = {
    "char": CharTokenizer(TEXT),
    "char-with-replacement": CharTokenizer(TEXT + "\ufffd<|>"),
    "char-of-everything": CharTokenizer("".join(HOSTILE)),
    "char-of-nothing": CharTokenizer(""),
    "byte": ByteTokenizer(),
    "bpe": train_bpe(iter([TEXT * 20]), 300, ["<|endoftext|>"]),
    "bpe-two-special": train_bpe(iter([TEXT * 20]), 290, ["<s>", "<|user|>"]),
}


def written(folder: Path, tokenizer: Tokenizer, own: bool = True) -> Path:
    for name, text in tokenizer_files(tokenizer, own, 32).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_the_same_for_every_text(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]
    folder = written(tmp_path, tokenizer)
    assert first_difference(folder, tokenizer, own=True) is None

    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    draw = random.Random(0)
    points = [*range(1, 0x250), *range(0x3040, 0x3060), *range(0x1F600, 0x1F610), 0xFFFD, 0xFEFF]
    for _ in range(300):
        text = "".join(chr(draw.choice(points)) for _ in range(draw.randrange(40)))
        expected = tokenizer.encode(text).tolist()
        assert loaded(text, add_special_tokens=False)["input_ids"] == expected, repr(text)
        assert loaded(text)["input_ids"] == encode_prompt(tokenizer, text)
    assert loaded.eos_token_id == loaded.bos_token_id == tokenizer.end_of_text
    assert len(loaded) == tokenizer.vocab_size


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "char-of-nothing"])
def test_the_file_is_read_back_by_dtt_with_the_same_tokens(name: str, tmp_path: Path) -> None:
    """As `init_from` does: any tokenizer.json is a tokenizer of dtt."""
    tokenizer = TOKENIZERS[name]
    end = transformers.AutoTokenizer.from_pretrained(written(tmp_path, tokenizer)).eos_token
    again = BpeTokenizer((tmp_path / "tokenizer.json").read_text(encoding="utf-8"), end)
    assert again.end_of_text == tokenizer.end_of_text
    for text in HOSTILE:
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist(), repr(text)
    text = "".join(char for char in TEXT if tokenizer.unknown not in tokenizer.encode(char))
    assert len(text) > 20 and again.decode(tokenizer.encode(text)) == text


def test_a_published_tokenizer_stays_as_it_is(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["bpe"]
    files = tokenizer_files(tokenizer, False, 32)
    assert files["tokenizer.json"] == tokenizer.to_json()
    assert first_difference(written(tmp_path, tokenizer, own=False), tokenizer, False) is None


def test_a_difference_is_named(tmp_path: Path) -> None:
    written(tmp_path, TOKENIZERS["char"])
    found = first_difference(tmp_path, CharTokenizer(TEXT + "Z"), own=True)
    assert found is not None and "there and" in found
