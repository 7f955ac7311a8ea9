"""What a tokenizer is trained on: bounded, spread, the same however it is read."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest

from dtt.config.data import Bpe, Char
from dtt.config.sources import Text
from dtt.data.preparation import sample as sampling
from dtt.data.preparation.sample import LONGEST_WORD, cut_long_runs, sampled_texts, train_tokenizer
from dtt.data.preparation.workers import LocalWorkers
from dtt.data.sources import Part, SourceReader, open_source
from dtt.tokenizer import train_bpe

DOCUMENTS = 2000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceReader:
    """2000 documents of about 1 kB in five parts, each with its number in front."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("sample") / "text.txt"
    letters = "abcdefgh" * 400
    texts = [f"{i} {letters[: draw.randrange(1000, 3000)]}" for i in range(DOCUMENTS)]
    path.write_text("\n\n".join(text.replace("a", " a") for text in texts))
    return open_source(Text(path=(str(path),), separator="\n\n"))


def numbers(source: SourceReader, limit: int, workers: int = 1, **named: object) -> list[int]:
    parts = source.parts(0.0)
    texts = sampled_texts(source, parts, 0.1, limit, LocalWorkers(workers), **named)  # type: ignore[arg-type]
    return [int(text.split(" ", 1)[0]) for text in texts]


def training(source: SourceReader) -> dict[int, int]:
    """Bytes of each training document, by its number."""
    from dtt.data.preparation.encoding import training_documents

    texts = [t for part in source.parts(0.0) for t in training_documents(source, part, 0.1)]
    return {int(text.split(" ", 1)[0]): len(text) for text in texts}


def test_small_corpora_are_learned_from_as_a_whole(source: SourceReader) -> None:
    assert sorted(numbers(source, 1 << 30)) == sorted(training(source))


def test_a_sample_is_bounded_and_spread_over_all_that_is_read(
    source: SourceReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "SPARSENESS", 1000)
    sizes = training(source)
    found = numbers(source, 400_000)
    total = sum(sizes[number] for number in found)
    assert len(set(found)) == len(found) and 395_000 < total <= 400_000
    # Each fifth of the corpus has its fifth of the sample, within four standard deviations.
    for fifth in range(5):
        share = sum(number * 5 // DOCUMENTS == fifth for number in found) / len(found)
        assert abs(share - 0.2) < 4 * (0.16 / len(found)) ** 0.5


def test_it_reads_no_more_than_it_must(
    source: SourceReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtt.data.documents.PART_BYTES", 1 << 17)
    read: list[int] = []
    original = type(source).read

    def noted(self: SourceReader, part: Part) -> object:
        read.append(part.index)
        return original(self, part)

    monkeypatch.setattr(type(source), "read", noted)
    parts = len(source.parts(0.0))
    numbers(source, 100_000)
    assert parts > 20
    assert (
        3 <= len(read) <= 6
    )  # four times the sample, of 131 kB each, of which a tenth is held out
    assert parts - 5 > max(read) - min(read) > 3  # not neighbours


@pytest.mark.parametrize("limit", [50_000, 1_000_000])
def test_workers_and_spilling_change_nothing(
    source: SourceReader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: int
) -> None:
    one = numbers(source, limit)
    monkeypatch.setattr(sampling, "SPILL", 1000)
    assert numbers(source, limit, workers=2, scratch=tmp_path) == one
    assert not any(tmp_path.iterdir())


def test_a_document_larger_than_the_sample_gives_its_head(source: SourceReader) -> None:
    texts = list(sampled_texts(source, source.parts(0.0), 0.1, 100, LocalWorkers(1)))
    assert len(texts) == 1 and len(texts[0]) == 100


def test_memory_does_not_grow_with_what_is_read(
    source: SourceReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "SPARSENESS", 1000)
    monkeypatch.setattr(sampling, "SPILL", 1 << 16)
    size = sum(training(source).values())
    tracemalloc.start()
    sum(1 for _ in sampled_texts(source, source.parts(0.0), 0.1, 1 << 18, LocalWorkers(1)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20 and size > 3 << 20  # a part of 1 MB, read, split and encoded


def test_long_runs_are_cut() -> None:
    long, rest = "x" * LONGEST_WORD, "y" * 5000
    for text, expected in (
        (f"a {long} b", f"a {long} b"),
        (f"a {long}{rest} b", f"a {long} b"),
        (f"{long}{rest}", long),
        (f"a{' ' * 5000}b", f"a{' ' * LONGEST_WORD}b"),
        ("", ""),
    ):
        assert "".join(cut_long_runs(text)) == expected
    for shift in range(0, LONGEST_WORD, 17):  # wherever a run begins
        text = "ab " * 50 + "c" * shift + " " + long + rest
        assert len("".join(cut_long_runs(text))) == len(text) - len(rest)


def test_a_word_of_ten_megabytes_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat. " * 1000 + "q" * 10_000_000 + " the cat" * 1000)
    source = open_source(Text(path=(str(path),)))
    parts = source.parts(0.1)
    made = train_tokenizer(
        source, Bpe(vocab_size=300, train_bytes=20_000_000), parts, val_fraction=0.1
    )
    longest = max(len(made.decode([i])) for i in range(made.vocab_size))
    assert longest <= len(" ") + LONGEST_WORD and made.encode(" the cat").size <= 3


def test_a_small_vocabulary_is_learned_from_little_text(
    source: SourceReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []

    def record(source: object, parts: object, val: object, limit: int, *rest: object) -> list[str]:
        limits.append(limit)
        return ["some text"]

    monkeypatch.setattr("dtt.data.preparation.sample.sampled_texts", record)
    for settings in (Bpe(), Bpe(vocab_size=50_000), Bpe(train_bytes=7)):
        train_tokenizer(source, settings, [], val_fraction=0.1)
    assert limits == [4_096_000, 100_000_000, 7]


def test_the_tokenizer_is_that_of_the_training_documents(source: SourceReader) -> None:
    from dtt.data.preparation.encoding import training_documents

    parts = source.parts(0.0)
    texts = [t for part in parts for t in training_documents(source, part, 0.1)]
    direct = train_bpe(iter(texts), 300, ["<|endoftext|>"])
    settings = Bpe(vocab_size=300, train_bytes=100_000_000)
    for count in (1, 2):
        made = train_tokenizer(
            source, settings, parts, val_fraction=0.1, workers=LocalWorkers(count)
        )
        assert made.to_json() == direct.to_json()
    letters = train_tokenizer(source, Char(), parts, val_fraction=0.1)
    assert letters.vocab_size == 2 + len({char for text in texts for char in text})
