"""Looking at data: the text that was prepared comes back, and is found where it is."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_corpus import make_corpus
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers

from dtt.cli import main
from dtt.data.inspection import look
from dtt.data.inspection.look import END_NAME, Look, write_tokens
from dtt.data.inspection.token_text import JoinedText, printable, token_bytes, token_texts
from dtt.data.packing import PackedWindows
from dtt.data.windows import ContiguousWindows
from dtt.errors import DataError
from dtt.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer, train_bpe

TEXTS = [
    "Once upon a time there was a fox.",
    "naïve café, Ελληνικά, 中文字, 🦊🦊 and a\u00a0no-break space",
    "def f(x):\n    return x  # a fox\r\n",
    "<|endoftext|> is only text here",
    "aaaa" * 30,
    "a",
    "the fox, the fox and the fox",
]
Run = Callable[..., tuple[int, str, str]]


def bpe() -> BpeTokenizer:
    return train_bpe(iter(TEXTS * 3), 330, ["<|endoftext|>", "<|pad|>"])


def metaspace() -> BpeTokenizer:
    """A tokenizer of whole words whose decoder is not byte-level."""
    words = sorted({f"▁{word}" for text in TEXTS for word in text.split()})
    names = ["</s>", "<unk>", *words]
    inner = HuggingFaceTokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return BpeTokenizer(inner.to_str(), "</s>")


def tokenizers() -> dict[str, Tokenizer]:
    return {"char": CharTokenizer("".join(TEXTS)), "byte": ByteTokenizer(), "bpe": bpe()}


@pytest.fixture(params=["char", "byte", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return tokenizers()[request.param]


@pytest.fixture
def dtt(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    make_corpus(Path("data/small-bpe-1"), {"train": TEXTS, "val": TEXTS[:2]}, bpe())

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["data", "show", *words])
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


def test_joined_bytes_are_the_text(tokenizer):
    joined = JoinedText(token_bytes(tokenizer), tokenizer.end_of_text)
    for text in TEXTS:
        ids = tokenizer.encode(text).astype("i8")
        data, stops = joined.join(ids)
        assert data == text.encode() == tokenizer.decode(ids).encode()
        assert [data[a:b] for a, b in zip([0, *stops], stops, strict=False)] == [
            joined.join(ids[i : i + 1])[0] for i in range(len(ids))
        ]


def test_texts_of_tokens_add_up_to_the_text(tokenizer):
    for text in TEXTS:
        pieces = list(token_texts(tokenizer, tokenizer.encode(text).tolist()))
        if tokenizer.vocab_size < 100 or text.isascii():  # a character in one token
            assert "".join(pieces) == text
        else:
            assert "\\x" in "".join(pieces)


def test_a_token_that_ends_inside_a_character_is_shown_as_bytes():
    assert list(token_texts(ByteTokenizer(), [0x61, 0xC3, 0xA9])) == ["a", "\\xc3", "\\xa9"]


def test_tokens_that_depend_on_their_neighbours():
    tokenizer = metaspace()
    assert token_bytes(tokenizer) is None
    ids = tokenizer.encode("the fox and the fox").tolist()
    assert list(token_texts(tokenizer, ids)) == ["the", " fox", " and", " the", " fox"]


@pytest.mark.parametrize("ended", [True, False])
def test_documents_come_back(tmp_path, tokenizer, ended, monkeypatch):
    monkeypatch.setattr(look, "BLOCK", 7)
    corpus = make_corpus(tmp_path / "c", {"train": TEXTS}, tokenizer, ended=ended)
    shown = Look(corpus, "train")
    assert ["".join(shown.document(i)) for i in range(len(shown.index))] == TEXTS


def test_windows_are_the_inputs_and_the_last_target(tmp_path, tokenizer):
    corpus = make_corpus(tmp_path / "c", {"train": TEXTS}, tokenizer)
    shown, stream = Look(corpus, "train"), corpus.stream("train")
    cut = ContiguousWindows(stream, 10, 0)
    windows = [shown.window(i, cut)[0] for i in range(cut.count)]
    targets = [token for window in windows for token in window[1:]]
    assert targets == stream.read(1, 10 * cut.count).tolist()
    assert [window[0] for window in windows[1:]] == [window[-1] for window in windows[:-1]]
    assert next(shown.texts(windows[0])) == END_NAME


def test_packed_windows_are_shown_by_the_piece(tmp_path, tokenizer):
    corpus = make_corpus(tmp_path / "c", {"train": TEXTS}, tokenizer)
    shown = Look(corpus, "train")
    packed = PackedWindows(shown.stream, 60)
    texts = [shown.text(piece) for i in range(packed.count) for piece in shown.window(i, packed)]
    whole = {END_NAME + text + END_NAME for text in TEXTS if len(tokenizer.encode(text)) < 60}
    assert whole and whole <= set(texts)
    assert sum(
        len(piece) - 1 for i in range(packed.count) for piece in shown.window(i, packed)
    ) == (len(shown.stream) - 1)


@pytest.mark.parametrize("block", [1, 5, 64, 10_000])
@pytest.mark.parametrize("wanted", ["fox", "aa", "🦊", "a", "x", "the fox", "endoftext", "nothing"])
def test_search_finds_every_place(tmp_path, tokenizer, block, wanted, monkeypatch):
    monkeypatch.setattr(look, "BLOCK", block)
    corpus = make_corpus(tmp_path / "c", {"train": TEXTS}, tokenizer)
    expected = [
        (number, place)
        for number, text in enumerate(TEXTS)
        for place in range(len(text))
        if text.startswith(wanted, place)
    ]
    matches = list(Look(corpus, "train").search(wanted))
    assert [match.number for match in matches] == [number for number, _ in expected]
    for match, (number, place) in zip(matches, expected, strict=True):
        assert TEXTS[number][:place].endswith(match.before)
        assert TEXTS[number][place:].startswith(wanted + match.behind)
        assert len(match.before) >= min(place, 10)
        assert len(match.behind) >= min(len(TEXTS[number]) - place - len(wanted), 10)


def test_search_without_byte_level_tokens(tmp_path):
    corpus = make_corpus(tmp_path / "c", {"train": ["the fox", "a fox"]}, metaspace())
    assert [match.number for match in Look(corpus, "train").search("fox")] == [0, 1]


def test_search_in_random_text_against_str_find(tmp_path, monkeypatch):
    monkeypatch.setattr(look, "BLOCK", 13)
    draw = random.Random(1)
    texts = ["".join(draw.choices("abé", k=draw.randint(1, 60))) for _ in range(40)]
    corpus = make_corpus(tmp_path / "c", {"train": texts}, train_bpe(iter(texts), 300, ["<s>"]))
    for wanted in ("ab", "éa", "aba", "bbb", "é"):
        found = [match.number for match in Look(corpus, "train").search(wanted)]
        assert found == [
            n for n, t in enumerate(texts) for i in range(len(t)) if t.startswith(wanted, i)
        ]


def test_a_token_beyond_the_vocabulary_is_named(tmp_path):
    corpus = make_corpus(tmp_path / "c", {"train": TEXTS}, ByteTokenizer())
    size = corpus.manifest.shards["train"][0].tokens * 2
    (tmp_path / "c" / "train-00000.bin").write_bytes(b"\xff\x7f" * (size // 2))
    with pytest.raises(DataError, match=r"token 32767 .* is beyond the vocabulary"):
        list(Look(corpus, "train").document(0))


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00003.docs"])
def test_damage_inside_of_the_vocabulary_is_noticed(dtt, capsys, name):
    path = Path("data/small-bpe-1") / name
    good = path.read_bytes()
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    for words in (
        [],
        ["--document", "6"],
        ["--search", "fox"],
        ["--window", "0", "--context", "8"],
    ):
        code, out, err = dtt("small", *words)
        assert (code, out) == (3, "")
        assert f"{path} is damaged: its SHA-256 is not the manifest's" in err
    assert dtt("small", "--split", "val")[0] == 0
    assert main(["data", "stats", "small"]) == 3
    assert f"{path} is damaged" in capsys.readouterr().err
    compare = ["tokenizer", "compare", "byte", "--on", "small", "--split", "train"]
    assert main(compare) == 3
    assert f"{path} is damaged" in capsys.readouterr().err


def test_the_text_goes_to_stdout_and_what_it_is_to_stderr(dtt):
    for number, text in enumerate(TEXTS):
        code, out, err = dtt("small", "--document", str(number))
        assert (code, out) == (0, text + "\n")
        assert err.startswith(f"data/small-bpe-1, train, document {number} of 7: ")


def test_a_window_is_text_with_the_ends_of_documents_named(dtt):
    text = "".join(END_NAME + text for text in TEXTS)
    size = sum(len(bpe().encode(text)) + 1 for text in TEXTS)
    code, out, err = dtt("small", "--window", "0", "--context", str(size))
    assert (code, out) == (0, text + END_NAME + "\n")
    assert err == f"data/small-bpe-1, train, window 0 of 1, {size} tokens each\n"


def test_tokens_are_divided_by_bars_or_colours(dtt):
    assert dtt("small", "--document", "5", "--tokens")[1] == "a\n"
    out = dtt("small", "--document", "0", "--tokens")[1]
    assert out.replace("|", "") == TEXTS[0] + "\n"
    assert out.count("|") == len(bpe().encode(TEXTS[0])) - 1
    first, second = look.COLOURS
    assert "".join(write_tokens(["a", "b\n", "c"], True)) == (
        f"{first}a{look.OFF}{second}b\u23ce{look.OFF}\n{second}{look.OFF}{first}c{look.OFF}"
    )


def test_a_terminal_does_not_get_control_characters(dtt, monkeypatch):
    assert printable("a\x1b[2Jb\u202ec\n\td") == "a\\x1b[2Jb\\u202ec\n\td"
    make_corpus(Path("data/evil"), {"train": ["a\x1bb"], "val": ["a"]}, ByteTokenizer())
    assert dtt("evil", "--document", "0")[1] == "a\x1bb\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert dtt("evil", "--document", "0")[1] == "a\\x1bb\n"
    assert look.COLOURS[0] in dtt("evil", "--document", "0", "--tokens")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert dtt("evil", "--document", "0", "--tokens")[1] == "a|\\x1b|b\n"


def test_search_on_the_command_line(dtt):
    code, out, err = dtt("small", "--search", "fox", "--limit", "2")
    assert (code, err) == (0, "the first 2; more with --limit N\n")
    assert [line.split()[0] for line in out.splitlines()] == ["0", "2"]
    code, out, err = dtt("small", "--search", "foxes")
    assert (code, out, err) == (0, "", "not found in 7 documents of the train split\n")


def test_previews_are_spread_over_the_split(dtt):
    code, out, err = dtt("small", "--limit", "3")
    assert code == 0 and "7 documents" in err
    assert [line.split()[0] for line in out.splitlines()] == ["document", "0", "2", "4"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("none", 3, "none is not a prepared corpus, a run folder, or a name below data/; prepared"),
        ("s", 3, "s is the beginning of several corpora; choose one of: small-bpe-1, small-bpe-2"),
        ("small-bpe-1 --document 7", 2, "--document 7: the train split has 7 documents; give a"),
        ("small-bpe-1 --window 99 --context 8", 2, "--window 99: the train split has "),
        ("small-bpe-1 --window 0", 2, "--window needs the length of windows; give --context T"),
        ("small-bpe-1 --window 0 --document 0", 2, "--document and --window are both given"),
        ("small-bpe-1 --tokens", 2, "--tokens needs --document N or --window N"),
        ("small-bpe-1 --source x", 2, "x: data/small-bpe-1 is not a mixture; leave --source out"),
        ("small-bpe-1 --search=", 2, "--search: the text is empty"),
        ("small-bpe-1 --document -1", 2, "--document: "),
    ],
)
def test_wrong_requests_are_one_line(dtt, words, code, message):
    make_corpus(Path("data/small-bpe-2"), {"train": TEXTS, "val": TEXTS}, bpe())
    found, out, err = dtt(*words.split())
    assert (found, out) == (code, "")
    assert err.startswith("dtt data") and message in err and err.count("\n") == 1
