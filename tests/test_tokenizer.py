"""Tokenizers: lossless, deterministic, safe against text that looks like a special token."""

import json
import random

import pytest
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from dtt.errors import DataError
from dtt.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    fingerprint,
    load_tokenizer,
    parse_tokenizer,
    train_bpe,
)

TEXTS = [
    'The fox said: "I don\'t know."\n\n  Two  spaces,\ttabs; 12345 and 3.14!\n',
    "naïve café, Ελληνικά, русский, 中文字, 🦊🦊 and a\u00a0no-break space",
    "def f(x):\n    return [x**2 for _ in range(10)]  # comment\r\n",
    "<|endoftext|> is only text here",
    "",
    " ",
    "\n\n\n",
    "a" * 5000,
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(iter(TEXTS * 3), 400, ["<|endoftext|>", "<|pad|>"])


def all_tokenizers(bpe):
    return [CharTokenizer("".join(TEXTS)), ByteTokenizer(), bpe]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(bpe, text):
    for tokenizer in all_tokenizers(bpe):
        ids = tokenizer.encode(text)
        assert ids.dtype == "uint32"
        assert tokenizer.decode(ids) == text
        assert (ids < tokenizer.vocab_size).all() and (ids != tokenizer.end_of_text).all()


def test_file_round_trip(bpe, tmp_path):
    for tokenizer in all_tokenizers(bpe):
        (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        again = load_tokenizer(tmp_path)
        assert fingerprint(again) == fingerprint(tokenizer)
        assert again.end_of_text == tokenizer.end_of_text
        for text in TEXTS:
            assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_bpe_training_is_deterministic(bpe):
    again = train_bpe(iter(TEXTS * 3), 400, ["<|endoftext|>", "<|pad|>"])
    assert fingerprint(again) == fingerprint(bpe)


@pytest.mark.parametrize("text", TEXTS)
def test_fast_path_gives_the_tokens_of_tokenizers(bpe, text):
    assert bpe._fast is not None
    slow = bpe._inner.encode(text, add_special_tokens=False).ids
    assert bpe.encode(text).tolist() == slow


def test_words_are_cut_as_the_published_pattern_of_gpt2_cuts_them(bpe):
    published = tiktoken.Encoding(
        "published",
        pat_str=r50k_pat_str,
        mergeable_ranks=bpe._fast._mergeable_ranks,
        special_tokens={},
    )
    draw = random.Random(1)
    letters = [*" \n\t\r'\u00a0\u2003\u3000\x0b", *"sdmtlvreLL", *"09½", *"é字🦊-._!\u0301"]
    for _ in range(3000):
        text = "".join(draw.choices(letters, k=draw.randrange(40)))
        assert bpe.encode(text).tolist() == published.encode(text)


@pytest.mark.parametrize(
    "text", [" " * 1_500_000, " " * 1_500_000 + "a", "ab\n" + "\t \n" * 500_000 + "b"]
)
def test_a_million_blanks_are_no_reason_to_fail(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_kinds_that_tiktoken_cannot_express_are_left_to_tokenizers(bpe):
    data = json.loads(bpe.to_json())
    data["pre_tokenizer"]["add_prefix_space"] = True
    other = BpeTokenizer(json.dumps(data))
    assert other._fast is None
    assert other.encode("fox").tolist() != bpe.encode("fox").tolist()


def test_char_unknown_is_explicit():
    tokenizer = CharTokenizer("abc")
    assert tokenizer.encode("axb€").tolist() == [2, 1, 3, 1]
    assert tokenizer.decode([2, 1, 3, 0]) == "a\N{REPLACEMENT CHARACTER}b"
    assert tokenizer.vocab_size == 5


def test_char_empty_alphabet():
    assert CharTokenizer("").encode("ab").tolist() == [1, 1]


@pytest.mark.parametrize(
    "text",
    ["", "not json", "[]", "{}", '{"model": 3}', '{"model": {"type": "BPE"}}', '{"dtt": "x"}'],
)
def test_what_is_no_tokenizer_is_refused(text):
    with pytest.raises(DataError, match=r"f\.json is not a tokenizer"):
        parse_tokenizer(text, "f.json")


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        load_tokenizer(tmp_path / "b.json")


def test_end_of_text_must_exist(bpe):
    data = json.loads(bpe.to_json())
    with pytest.raises(DataError, match="no token <end>"):
        BpeTokenizer(json.dumps(data), "<end>")
    assert BpeTokenizer(json.dumps(data), "<|pad|>").end_of_text == 1
