"""The rules of single documents: thresholds from both sides, and definitions recomputed."""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from typing import Any

import pytest

from dtt.config.cleaning import (
    C4,
    Decontaminate,
    FineWeb,
    Gopher,
    GopherRepetition,
    Length,
    Pii,
    RegexDrop,
    RegexReplace,
    Unicode,
    UserFunction,
)
from dtt.data.cleaning.chain import RULES
from dtt.data.cleaning.patterns import EMAIL, MaskAddresses
from dtt.data.cleaning.step import Dropped
from dtt.errors import DataError

PROSE = (
    "The house stood at the end of a long road, and nobody had lived in it for years. "
    "We went there with a lamp on the first evening of the autumn holidays, to see it. "
    "My sister said that she could hear somebody walking about on the upper floor of it.\n"
    "I did not believe her, but I have never been back to that place since, nor has she. "
    "What we found is hard to describe, because each of us remembers something different."
)


def apply(settings: Any, text: str) -> str | None:
    """Return what a step makes of a text, None where it leaves it out."""
    result = RULES[settings.name][0](settings)(text)
    return None if isinstance(result, Dropped) else result


def reason(settings: Any, text: str) -> str:
    result = RULES[settings.name][0](settings)(text)
    return result.reason if isinstance(result, Dropped) else "kept"


@pytest.mark.parametrize(
    "step", [Gopher(), GopherRepetition(), C4(), FineWeb(), Length(min_words=1)]
)
def test_prose_passes_unchanged(step: Any) -> None:
    assert apply(step, PROSE) == PROSE


# --- unicode -------------------------------------------------------------------------------------


def test_unicode_normalisation() -> None:
    assert apply(Unicode(), "e\u0301t\u00e9 \ufb01n") == "\u00e9t\u00e9 \ufb01n"
    assert apply(Unicode(form="NFKC"), "\ufb01n\u00b2") == "fin2"
    assert apply(Unicode(), "a\r\nb\rc\u2028d\x85e\tf\n") == "a\nb\nc\nd\ne\tf\n"
    assert apply(Unicode(), "\ufeffa\x00b\x1bc\x7fd\x9fe\ud800f") == "abcdef"
    assert apply(Unicode(newlines=False), "a\r\nb\u2028c") == "a\r\nb\u2028c"
    assert apply(Unicode(control=False), "a\x00b\ufeff") == "a\x00b\ufeff"
    assert apply(Unicode(form=None), "e\u0301") == "e\u0301"


@pytest.mark.parametrize("form", ["NFC", "NFKC", "NFD", "NFKD"])
def test_unicode_is_normal_afterwards(form: Any) -> None:
    random.seed(1)
    step = Unicode(form=form)
    for _ in range(300):
        limit = random.choice([0x80, 0x500, 0x11000])
        text = "".join(chr(random.randrange(limit)) for _ in range(20))
        once = apply(step, text)
        assert once is not None and unicodedata.is_normalized(form, once)
        assert apply(step, once) == once
        allowed = {"\n", "\t"}
        assert all(c in allowed or unicodedata.category(c) not in ("Cc", "Cs") for c in once)


# --- quality -------------------------------------------------------------------------------------


def repeat(word: str, count: int) -> str:
    return " ".join([word] * count)


STOPS = "the of "


@pytest.mark.parametrize(
    ("keeps", "drops", "why"),
    [
        (STOPS + repeat("word", 48), STOPS + repeat("word", 47), "fewer than 50 words"),
        (STOPS + repeat("word", 99_998), STOPS + repeat("word", 99_999), "more than 100000 words"),
        (
            "the that " + repeat("abc", 60),
            "the be " + repeat("abc", 60),
            "fewer than 3 letters a word",
        ),
        (
            "the that " + repeat("a" * 10, 60),
            "the that " + repeat("a" * 11, 60),
            "more than 10 letters a word",
        ),
        (
            STOPS + repeat("word", 92) + " # #" * 5,
            STOPS + repeat("word", 60) + " # # #" * 3,
            "hash",
        ),
        (STOPS + repeat("word...", 9) + repeat(" word", 90), repeat("the... of", 60), "ellipses"),
        (
            "- these words and others\n" * 18 + "words that are all others\n" * 2,
            "- these words and others\n" * 19 + "words that are all others\n" * 2,
            "bullet",
        ),
        (
            "these words and all others\n" * 14 + "that will have been…\n" * 6,
            "these words and all others\n" * 14 + "that will have been…\n" * 7,
            "end with an ellipsis",
        ),
        (
            STOPS + repeat("word", 78) + repeat(" 1234", 20),
            STOPS + repeat("word", 77) + repeat(" 1234", 21),
            "words with letters",
        ),
        ("The OF " + repeat("word", 60), "the " + repeat("word", 60), "stop words"),
    ],
)
def test_gopher_on_both_sides_of_each_threshold(keeps: str, drops: str, why: str) -> None:
    assert reason(Gopher(), keeps) == "kept"
    assert why in reason(Gopher(), drops)


def test_null_turns_a_rule_off() -> None:
    off = Gopher(
        **{name: None for name in Gopher.model_fields if name.startswith("max_")},
        min_words=None,
        min_word_length=None,
        min_alphabetic=None,
        min_stop_words=0,
    )
    for text in ("", "#", "...", "- a\n- b", "1 2 3", repeat("x" * 50, 100)):
        assert apply(off, text) == text
    assert apply(FineWeb(min_punctuated=None, max_short=None), "ab\ncd") == "ab\ncd"


def repetition_shares(text: str) -> dict[str, float]:
    """Every share of table A1, from its definition and in the plainest way."""
    shares: dict[str, float] = {}
    for kind, pieces in (
        ("lines", text.split("\n")),
        ("paragraphs", re.split(r"\n\s*\n", text)),
    ):
        pieces = [piece.strip() for piece in pieces if piece.strip()]
        again = [piece for i, piece in enumerate(pieces) if piece in pieces[:i]]
        shares[f"repeated {kind}"] = len(again) / len(pieces)
        shares[f"text in repeated {kind}"] = sum(map(len, again)) / len(text)
    words = text.split()
    for n in (2, 3, 4):
        grams = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
        most = max(grams.values(), default=0)
        tops = [len(gram) for gram, count in grams.items() if count == most > 1]
        shares[f"one {n}-gram"] = most * max(tops, default=0) / len(text)
    for n in (5, 6, 7, 8, 9, 10):
        seen, size, i = set(), 0, 0
        while i + n <= len(words):
            gram = " ".join(words[i : i + n])
            size += len(gram) - n + 1 if gram in seen else 0
            i += n if gram in seen else 1
            seen.add(gram)
        shares[f"repeated {n}-grams"] = size / len(text)
    return shares


LIMITS = {
    "repeated paragraphs": 0.3,
    "text in repeated paragraphs": 0.2,
    "repeated lines": 0.3,
    "text in repeated lines": 0.2,
    **{f"one {n}-gram": share for n, share in zip((2, 3, 4), (0.2, 0.18, 0.16), strict=True)},
    **{f"repeated {n}-grams": (20 - n) / 100 for n in (5, 6, 7, 8, 9, 10)},
}


def test_repetition_is_that_of_the_definition() -> None:
    source, broken = random.Random(3), Counter[str]()
    for _ in range(1500):
        kinds = source.choice([3, 8, 20, 60, 400])
        count = source.randrange(1, 120)
        words = [f"w{source.randrange(kinds)}" + "x" * source.randrange(4) for _ in range(count)]
        for _ in range(source.randrange(4)):
            start = source.randrange(len(words))
            words += words[start : start + source.randrange(14)]
        ends = source.choice([[" "], [" ", " ", "\n"], [" ", "\n", "\n\n", "\n \n"]])
        text = "".join(word + source.choice(ends) for word in words)
        shares = repetition_shares(text)
        expected = next((n for n, limit in LIMITS.items() if shares[n] > limit), "kept")
        found = reason(GopherRepetition(), text)
        assert expected in found, (expected, found, text)
        broken[expected] += 1
    assert len(broken) >= 8, broken  # most of the rules were the first to break somewhere


def test_c4_keeps_sentences() -> None:
    page = (
        "Home | About | Contact\n"
        "This is a first sentence with words.[1] And here is a second one!\n"
        "Too short a line.\n"
        "Please enable Javascript to see this page well.\n"
        "By using this site you accept the use of cookies.\n"
        'And she said to him: "This is the third."\n'
        "This line goes on and has no end...\n"
        f"This line has {'x' * 1001} one very long word.\n"
    )
    assert apply(C4(), page) == (
        "This is a first sentence with words. And here is a second one!\n"
        'And she said to him: "This is the third."'
    )
    two = "This line has one sentence only. \nAnd this one has another sentence."
    assert reason(C4(), two) == "too few sentences"
    assert apply(C4(min_sentences=2), two) is not None
    assert reason(C4(), page + "This is all Lorem Ipsum, as they say.") == "lorem ipsum"
    assert reason(C4(), page + "function f() { return now and then. }.") == "a brace"
    assert reason(C4(min_sentences=None), "nothing\nhere") == "no line remains"
    kept = C4(
        terminal=False, citations=False, javascript=False, policies=False, min_line_words=None
    )
    assert apply(kept, page) == page.rsplit("This line has", 1)[0].rstrip("\n")


def test_fineweb_on_both_sides_of_each_threshold() -> None:
    long = "This line is much longer than thirty characters"
    marks = [f"{long} {i}." for i in range(3)]
    bare = [f"{long} {i} and has no mark" for i in range(22)]
    assert reason(FineWeb(), "\n".join(marks + bare)) == "kept"  # 3 of 25
    assert "punctuation" in reason(FineWeb(), "\n".join(marks[:2] + bare[:20]))
    short = [f"Short {i}." for i in range(20)]
    lines = [f"{long} {i}." for i in range(10)]
    assert reason(FineWeb(), "\n".join(short + lines)) == "kept"  # 20 of 30
    assert "short lines" in reason(FineWeb(), "\n".join(short + lines[:9]))
    assert reason(FineWeb(), "\n".join([*lines, lines[0]])) == "kept"  # 1 of 11
    assert "repeated lines" in reason(FineWeb(), "\n".join([*lines[:8], lines[0]]))
    lists = "\n".join(f"Item {i} now." for i in range(9))
    assert "line feeds" in reason(FineWeb(max_newlines=0.29, max_short=None), lists)  # 8 / 27
    assert reason(FineWeb(max_newlines=0.3, max_short=None), lists) == "kept"
    assert reason(FineWeb(), " \n\n") == "no lines"
    assert (
        apply(
            FineWeb(),
            "彼は山に登り、そこで長い間ずっと海の方を静かに見ていたのであった、とのことだ。",
        )
        is not None
    )


def test_length() -> None:
    step = Length(min_characters=3, max_characters=9, min_words=2, max_words=3)
    assert [apply(step, text) for text in ("a b", "a b c d", "abc", "a", "a b cdefghi")] == [
        *("a b", None, None, None, None),
    ]


# --- patterns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to jo.doe+x@mail.example.co.uk, or", "write to EMAIL, or"),
        ("<a@b.org>;c_d@e-f.io.", "<EMAIL>;EMAIL."),
        ("'a.b@c.org','d@e.fr'", "'EMAIL','EMAIL'"),
        ("user@localhost @decorator a@b a @ b.com", "user@localhost @decorator a@b a @ b.com"),
        ("from 8.8.8.8 to 192.168.1.1 and 10.0.0.7", "from IP to 192.168.1.1 and 10.0.0.7"),
        ("8.8.8.8:80, (1.1.1.1) and 8.8.4.4.", "IP:80, (IP) and IP."),
        ("version 1.2.3 and 300.1.1.1 and 1.2.3.4.5", "version 1.2.3 and 300.1.1.1 and 1.2.3.4.5"),
        ("at 2606:4700:4700::1111 or 2001:4860::8888.", "at IP or IP."),
        ("std::string dead::beef a::b 12:30:45 ::1", "std::string dead::beef a::b 12:30:45 ::1"),
        ("fe80::1 and 2001:db8::1 stay", "fe80::1 and 2001:db8::1 stay"),
    ],
)
def test_addresses_are_masked(text: str, masked: str) -> None:
    assert apply(Pii(email="EMAIL", ip="IP"), text) == masked


def test_masking_can_be_partial_and_is_idempotent() -> None:
    text = "a@b.org 8.8.8.8 10.0.0.1"
    assert apply(Pii(email=None), text) == "a@b.org 192.0.2.1 10.0.0.1"
    assert apply(Pii(ip=None), text) == "email@example.com 8.8.8.8 10.0.0.1"
    everything = apply(Pii(public_only=False), text)
    assert everything == "email@example.com 192.0.2.1 192.0.2.1"
    assert apply(Pii(public_only=False), everything) == everything
    assert apply(Pii(email=r"\1"), "a@b.org") == r"\1"


def test_masking_takes_time_in_proportion_to_the_text() -> None:
    """A pattern that goes back would need hours for these."""
    for text in ("a" * 3_000_000 + "@", "a." * 1_000_000 + "@", "1." * 1_000_000, "ab:" * 700_000):
        assert apply(Pii(), text) == text


def test_sentences_take_time_in_proportion_to_the_text() -> None:
    step = C4(max_word_length=None, min_line_words=None, min_sentences=1)
    for text in ("." * 2_000_000 + "x.", "[1" * 500_000 + ".", "a.b!" * 500_000 + "."):
        assert apply(step, text) == text


def test_regular_expressions() -> None:
    assert apply(RegexDrop(pattern=r"(?i)secret"), "no SECRET here") is None
    assert apply(RegexDrop(pattern="a", matches=3), "a a b") == "a a b"
    assert apply(RegexDrop(pattern="a", matches=3), "a a a") is None
    assert apply(RegexReplace(pattern=r"(\d+) (\d+)", replacement=r"\2 \1"), "1 2 x") == "2 1 x"
    assert apply(RegexReplace(pattern=r"[ \t]+$|(?m:[ \t]+$)"), "a  \nb\t\n") == "a\nb\n"


# --- decontamination -----------------------------------------------------------------------------


def test_decontamination_is_that_of_sets_of_ngrams(tmp_path) -> None:
    source = random.Random(5)
    pick = lambda count: [f"w{source.randrange(40)}" for _ in range(count)]  # noqa: E731
    tests = [pick(source.choice([5, 8, 10, 13, 40])) for _ in range(60)]
    path = tmp_path / "eval.txt"
    path.write_text("\n".join(" ".join(words) for words in tests))
    step = RULES["decontaminate"][0](Decontaminate(path=(str(path),), separator="\n"))
    assert step.too_short == sum(len(words) < 8 for words in tests)
    grams = {
        tuple(words[i : i + 13])
        for words in tests
        if len(words) >= 8
        for i in range(max(len(words) - 12, 1))
    }
    hit = 0
    for _ in range(400):
        words = pick(source.randrange(30))
        if source.random() < 0.5:
            copied = source.choice(tests)
            words += copied[: source.choice([7, 8, 12, 13, 40])] + pick(5)
        expected = any(tuple(words[i : i + len(g)]) == g for g in grams for i in range(len(words)))
        text = ", ".join(words).upper()
        assert isinstance(step(text), Dropped) == expected
        hit += expected
    assert 30 < hit < 370


def test_evaluation_texts_from_files(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    sentence = "Which of these seven animals lays its eggs in the nests of others every spring?"
    (tmp_path / "in" / "a.jsonl").write_text(f'{{"q": [{{"text": "{sentence}"}}], "n": 1}}\n\n')
    for path in ("in", "in/*.jsonl", "in/a.jsonl"):
        step = Decontaminate.model_validate({"path": str(tmp_path / path)})
        assert apply(step, f"They asked: {sentence.lower()} And so on.") is None
        assert apply(step, "which of these seven animals lays its eggs in the nests") is not None
    japanese = "この七つの動物のうち毎年春に他の鳥の巣に卵を産むのはどれですか"
    (tmp_path / "j.txt").write_text(japanese)
    step = Decontaminate(path=(str(tmp_path / "j.txt"),))
    assert apply(step, f"質問:{japanese}。") is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such file"),
        ("short.txt", b"too short", "no text of 8 words"),
        ("bad.txt", b"abc \xff", r"byte 4 is not UTF-8"),
        ("bad.jsonl", b'{"a": 1}\n{"a"\n', r"bad.jsonl:2: not a JSON value"),
    ],
)
def test_evaluation_texts_that_cannot_be_used(tmp_path, name, content, message) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        apply(Decontaminate(path=(str(path),)), "x")


# --- a user's function ---------------------------------------------------------------------------


def test_a_users_function(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_steps.py").write_text(
        "import sys\n"
        "def shout(text):\n"
        "    if text == 'bad': raise KeyError('x')\n"
        "    if text == 'odd': return 3\n"
        "    if text == 'half': return 'ab\\ud800'\n"
        "    if text == 'exit': sys.exit(9)\n"
        "    return text.upper() if 'a' in text else None\n"
    )
    shout = UserFunction(function="my_steps:shout")
    assert apply(shout, "abc") == "ABC"
    assert apply(shout, "def") is None
    with pytest.raises(DataError, match=r"my_steps:shout failed with KeyError: 'x', on a text"):
        apply(shout, "bad")
    with pytest.raises(DataError, match="returned int"):
        apply(shout, "odd")
    half = r"my_steps:shout returned half a UTF-16 pair \('\\ud800' at character 2\), on a text"
    with pytest.raises(DataError, match=half):
        apply(shout, "half")
    with pytest.raises(DataError, match=r"my_steps:shout failed with SystemExit: 9, on a text"):
        apply(shout, "exit")
    (tmp_path / "ending_steps.py").write_text("raise SystemExit(9)")
    with pytest.raises(DataError, match="importing ending_steps failed with SystemExit: 9"):
        apply(UserFunction(function="ending_steps:shout"), "abc")
    for function, message in (
        ("my_stepz:shout", "no module named my_stepz"),
        ("my_steps:whisper", "has no function whisper"),
    ):
        with pytest.raises(DataError, match=message) as error:
            apply(UserFunction(function=function), "abc")
        assert error.value.exit_code == 3
    step = RULES["user"][0](shout)
    before = step.fingerprint()
    (tmp_path / "my_steps.py").write_text("def shout(text): return text")
    assert step.fingerprint() != before


def test_masking_e_mail_looks_only_around_an_at_and_finds_the_same():
    draw = random.Random(0)
    mask = MaskAddresses(Pii(ip=None, email="<mail>"))
    for _ in range(3000):
        words = [
            "a",
            "b.c",
            "@",
            "@",
            ".com",
            ".",
            "-",
            " ",
            "x" * draw.randrange(80),
            "1.org",
            "+",
        ]
        text = "".join(draw.choice(words) for _ in range(draw.randrange(60)))
        assert mask(text) == EMAIL.sub("<mail>", text)
