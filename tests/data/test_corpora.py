"""Mixtures end to end: one tokenizer for all, shares of the training windows, limits, errors."""

import re

import numpy as np
import pytest

from dtt.config.data import Bpe, Byte, Char, Data, Ingredient, TokenizerFile
from dtt.config.sources import Tales, Text
from dtt.data.corpora import open_corpora, prepare_corpora
from dtt.data.packing import PackedWindows
from dtt.data.windows import IGNORED
from dtt.errors import DataError
from dtt.tokenizer import fingerprint


def mixture(tmp_path, first=None, second=None, **settings) -> Data:
    book = tmp_path / "book.txt"
    book.write_text("“Ω” and 100 owls sat in a row. " * 300, encoding="utf-8")
    ingredients = (
        Ingredient(name="tales", source=Tales(stories=200), **(first or {})),
        Ingredient(name="book", source=Text(path=(str(book),)), **(second or {})),
    )
    return Data(mixture=ingredients, dir=tmp_path / "data", workers=1, **settings)


def test_all_corpora_have_the_tokenizer_of_all_their_text(tmp_path):
    corpora = prepare_corpora(mixture(tmp_path), Char())
    tales, book = (portion.corpus for portion in corpora.portions)
    assert fingerprint(tales.tokenizer) == fingerprint(book.tokenizer)
    assert tales.manifest.total("train", "unknown") == book.manifest.total("train", "unknown") == 0
    text = "“Ω” said Anna"
    assert corpora.tokenizer.decode(corpora.tokenizer.encode(text)) == text
    assert corpora.name == f"{tales.folder.name}+{book.folder.name}"
    # Found again, without a word.
    assert prepare_corpora(mixture(tmp_path), Char()).name == corpora.name


def test_a_bpe_is_trained_on_all_of_it_and_a_given_file_is_taken(tmp_path):
    data = mixture(tmp_path)
    bpe = prepare_corpora(data, Bpe(vocab_size=600))
    (file,) = (tmp_path / "data" / "tokenizers").glob("*/tokenizer.json")
    again = prepare_corpora(data, TokenizerFile(path=file))
    assert fingerprint(again.tokenizer) == fingerprint(bpe.tokenizer)
    merged = [bpe.tokenizer.decode([i]) for i in range(600)]
    assert any("Ω" in token for token in merged) and any("lived" in token for token in merged)


def test_weights_are_shares_of_the_windows_of_training(tmp_path):
    data = mixture(tmp_path, {"weight": 3}, {"weight": 1})
    corpora = prepare_corpora(data, Byte())
    assert [portion.share for portion in corpora.portions] == [0.75, 0.25]
    loader = corpora.loader(64, 8, seed=1, rank=0, ranks=1, pin=False)
    sources = np.concatenate([loader.batch(step).sources for step in range(100)])
    assert np.bincount(sources).tolist() == [600, 200]
    # The same shares of tokens where windows of one corpus are padded.
    loader = corpora.loader(700, 8, seed=1, rank=0, ranks=1, pin=False)
    assert loader.sources[0].padding > 0.1
    tokens = np.zeros(2)
    for step in range(200):
        batch = loader.batch(step)
        np.add.at(tokens, list(batch.sources), (batch.targets != IGNORED).sum(1).numpy())
    assert tokens[0] / tokens.sum() == pytest.approx(0.75, abs=0.005)
    folders = [portion.corpus.folder.name for portion in corpora.portions]
    assert open_corpora(data, folders).portions[1].share == 0.25


def test_without_weights_shares_follow_size_and_temperature(tmp_path):
    def shares(**settings):
        return [p.share for p in prepare_corpora(mixture(tmp_path, **settings), Byte()).portions]

    natural, even = shares(), shares(temperature=2.0)
    tokens = [
        portion.corpus.manifest.total("train", "tokens")
        for portion in prepare_corpora(mixture(tmp_path), Byte()).portions
    ]
    assert natural == pytest.approx([t / sum(tokens) for t in tokens])
    roots = [t**0.5 for t in tokens]
    assert even == pytest.approx([r / sum(roots) for r in roots])


def test_max_epochs_ends_a_corpus(tmp_path):
    data = mixture(tmp_path, {"weight": 1}, {"weight": 1, "max_epochs": 1})
    loader = prepare_corpora(data, Byte()).loader(64, 8, seed=1, rank=0, ranks=1, pin=False)
    book = loader.sources[1]
    seen = [
        (source, epoch, window)
        for step in range(4 * book.count // 8)
        for source, epoch, window in zip(*loader.samples(step), strict=True)
        if source == 1
    ]
    assert len(seen) == book.count == len({window for _, _, window in seen})
    assert all(epoch == 0 for _, epoch, _ in seen)
    assert loader.shares.total is None


def test_corpora_of_equal_size_have_orders_of_their_own(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("100 owls sat in a row. " * 300, encoding="utf-8")
    twins = tuple(
        Ingredient(name=name, source=Text(path=(str(book),)), weight=1.0) for name in "ab"
    )
    corpora = prepare_corpora(Data(mixture=twins, dir=tmp_path / "data"), Byte())
    loader = corpora.loader(64, 32, seed=1, rank=0, ranks=1, pin=False)
    sources, _, windows = loader.samples(0)
    assert windows[sources == 0].tolist() != windows[sources == 1].tolist()


def test_a_damaged_shared_tokenizer_is_made_again(tmp_path):
    data = mixture(tmp_path)
    good = prepare_corpora(data, Bpe(vocab_size=300))
    (path,) = (tmp_path / "data" / "tokenizers").glob("*/tokenizer.json")
    text = path.read_text()
    for damage in (text[:-100], text.replace('"t"', '"T"', 1), ""):
        path.write_text(damage)
        assert prepare_corpora(data, Bpe(vocab_size=300)).name == good.name
        assert path.read_text() == text
    (path.parent / "sha256").unlink()
    path.write_text("{}")
    assert prepare_corpora(data, Bpe(vocab_size=300), force=True).name == good.name
    assert path.read_text() == text


def test_each_corpus_is_cut_as_suits_it(tmp_path):
    corpora = prepare_corpora(mixture(tmp_path), Byte())
    loader = corpora.loader(1024, 2, seed=1, rank=0, ranks=1, pin=False)
    tales, book = loader.sources
    assert isinstance(tales, PackedWindows) and not isinstance(book, PackedWindows)
    end = corpora.tokenizer.end_of_text
    assert (tales.isolate, book.isolate) == (end, None)


def test_a_corpus_below_one_window_is_named(tmp_path):
    corpora = prepare_corpora(mixture(tmp_path), Byte())
    with pytest.raises(DataError, match=re.escape("the training text of book has")):
        corpora.loader(20_000, 2, seed=1, rank=0, ranks=1, pin=False)
