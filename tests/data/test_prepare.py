"""Preparing a corpus: lossless, the same bytes however it is done, faults named."""

import hashlib
import json
from itertools import pairwise

import numpy as np
import pytest

from dtt import storage
from dtt.config.data import Bpe, Byte, Char, Data, TokenizerFile
from dtt.config.sources import Stdlib, Tales, Text
from dtt.data.documents import part_bytes
from dtt.data.preparation.encoding import PartEncoder
from dtt.data.preparation.prepare import open_corpus, prepare
from dtt.data.shards import read_manifest
from dtt.data.tales import tales
from dtt.errors import DataError


def corpus_of(tmp_path, *, source, tokenizer=None, report=lambda line: None, **settings):
    data = Data(source=source, dir=tmp_path / "data", workers=1, **settings)
    return prepare(data, tokenizer or Char(), report=report)


def write(tmp_path, text, name="a.txt"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Text(path=(str(path),))


def tokens(corpus, split):
    stream = corpus.stream(split)
    return stream.read(0, len(stream)).tolist()


def digest(folder):
    files = sorted(p for p in folder.iterdir())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_tail_split_is_the_text_cut_in_two(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    corpus = corpus_of(tmp_path, source=write(tmp_path, text), val_fraction=0.1)
    decode, end = corpus.tokenizer.decode, corpus.tokenizer.end_of_text
    train, val = tokens(corpus, "train"), tokens(corpus, "val")
    assert decode(train) == text[:900] and decode(val) == text[900:]
    assert [train[0], train[-1], val[0], val[-1]] == [end] * 4
    assert corpus.manifest.total("val", "bytes") == 100
    assert corpus.manifest.total("val", "documents") == 1


def test_tail_split_never_cuts_a_character(tmp_path):
    text = "€" * 333
    corpus = corpus_of(tmp_path, source=write(tmp_path, text), val_fraction=0.1)
    both = [corpus.tokenizer.decode(tokens(corpus, s)) for s in ("train", "val")]
    assert "".join(both) == text and 30 <= len(both[1]) <= 35


def test_large_files_are_cut_into_parts_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("dtt.data.documents.PART_BYTES", 100)
    text = "".join(f"line {i} says {'x' * (i % 37)}\n" for i in range(300))
    for tokenizer in (Char(), Byte(), Bpe(vocab_size=300)):
        corpus = corpus_of(tmp_path, source=write(tmp_path, text), tokenizer=tokenizer)
        both = [corpus.tokenizer.decode(tokens(corpus, s)) for s in ("train", "val")]
        assert "".join(both) == text
        assert len(corpus.manifest.shards["train"]) > 20
        assert corpus.manifest.total("train", "documents") == 1


def test_separator_makes_documents_and_split_is_by_document(tmp_path, monkeypatch):
    monkeypatch.setattr("dtt.data.documents.PART_BYTES", 150)
    documents = [f"story {i % 150}: " + "word " * (i % 9) for i in range(300)]
    source = write(tmp_path, "\n\n".join(documents)).model_copy(update={"separator": "\n\n"})
    corpus = corpus_of(tmp_path, source=source, val_fraction=0.2)
    end, found = corpus.tokenizer.end_of_text, {}
    for split in ("train", "val"):
        stream = tokens(corpus, split)
        cuts = [i for i, t in enumerate(stream) if t == end]
        found[split] = [corpus.tokenizer.decode(stream[a + 1 : b]) for a, b in pairwise(cuts)]
    assert sorted(found["train"] + found["val"]) == sorted(documents)
    assert 20 < len(found["val"]) < 110
    # The same document is never on both sides.
    assert not set(found["train"]) & set(found["val"])


@pytest.mark.parametrize("tokenizer", [Char(), Bpe(vocab_size=300)])
def test_bytes_do_not_depend_on_workers(tmp_path, tokenizer):
    folders = []
    for workers in (1, 2):
        data = Data(source=Tales(stories=6000), dir=tmp_path / str(workers), workers=workers)
        folders.append(prepare(data, tokenizer).folder)
    assert folders[0].name == folders[1].name
    assert digest(folders[0]) == digest(folders[1])


def test_interrupted_preparation_continues(tmp_path, monkeypatch):
    data = Data(source=Tales(stories=6000), dir=tmp_path / "a", workers=1)
    whole = prepare(data, Byte()).folder
    data = data.model_copy(update={"dir": tmp_path / "b"})
    done = []

    def stop_after_one(self, part):
        if done:
            raise KeyboardInterrupt
        done.append(part.index)
        return original(self, part)

    def note(self, part):
        done.append(part.index)
        return original(self, part)

    original = PartEncoder.__call__
    monkeypatch.setattr(PartEncoder, "__call__", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, Byte())
    monkeypatch.setattr(PartEncoder, "__call__", note)
    again = prepare(data, Byte()).folder
    assert sorted(done) == [0, 1, 2]  # no part was encoded twice
    assert digest(again) == digest(whole)


def test_prepared_data_is_found_again(tmp_path, monkeypatch):
    data = Data(source=Tales(stories=300), dir=tmp_path, workers=1)
    first = prepare(data, Byte())
    monkeypatch.setattr(PartEncoder, "__call__", None)
    assert prepare(data, Byte()).folder == first.folder
    other = data.model_copy(update={"val_fraction": 0.3})
    with pytest.raises(TypeError):
        prepare(other, Byte())


def test_changed_text_is_prepared_anew(tmp_path):
    first = corpus_of(tmp_path, source=write(tmp_path, "hello world " * 20))
    second = corpus_of(tmp_path, source=write(tmp_path, "hello there " * 20))
    assert first.folder != second.folder


def test_tales_manifest_knows_the_floor(tmp_path):
    corpus = corpus_of(tmp_path, source=Tales(stories=500), val_fraction=0.1)
    expected = sum(tale.bits for tale in tales(0, 0, 500))
    found = corpus.manifest.ideal_bits("train") + corpus.manifest.ideal_bits("val")
    assert found == pytest.approx(expected, rel=1e-12)
    totals = json.loads((corpus.folder / "manifest.json").read_text())["totals"]
    bytes_ = corpus.manifest.total("val", "bytes")
    floor = corpus.manifest.ideal_bits("val") / bytes_
    assert totals["val"]["ideal_bits_per_byte"] == pytest.approx(floor)


def test_repeat_is_applied_after_the_split(tmp_path):
    source = write(tmp_path, "".join(chr(97 + i % 26) for i in range(100)))
    once = corpus_of(tmp_path, source=source, val_fraction=0.1)
    thrice = corpus_of(tmp_path, source=source, val_fraction=0.1, repeat=3)
    assert tokens(thrice, "train")[1:] == tokens(once, "train")[1:] * 3
    assert tokens(thrice, "val") == tokens(once, "val")


def test_unknown_characters_are_counted_and_said(tmp_path):
    said = []
    source = write(tmp_path, "a" * 90 + "xyzzyxyzzy")
    corpus = corpus_of(tmp_path, source=source, val_fraction=0.1, report=said.append)
    assert corpus.manifest.total("val", "unknown") == 10
    assert "10 of 11" in said[0] and "<unknown>" in said[0]


def test_stdlib(tmp_path):
    from dtt.data.sources import StdlibReader

    reader = StdlibReader(Stdlib())
    parts = reader.parts(0.0)
    assert [p.start for p in parts[1:]] == [p.stop for p in parts[:-1]]
    assert parts[0].start == 0 and parts[-1].stop == len(reader.files)
    texts = [d.text for d in reader.read(parts[0])]
    assert len(texts) > 10 and any("import" in text for text in texts)
    held_out = sum(p.stop - p.start for p in reader.parts(0.1) if p.held_out)
    assert 0 < held_out < 0.5 * len(reader.files)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1", "cp1252", "utf-8-sig"])
def test_declared_encodings(tmp_path, encoding):
    text = "déjà vu, naïve\n" * 40
    source = write(tmp_path, text.encode(encoding)).model_copy(update={"encoding": encoding})
    corpus = corpus_of(tmp_path, source=source, val_fraction=0.1)
    both = [corpus.tokenizer.decode(tokens(corpus, s)) for s in ("train", "val")]
    assert "".join(both) == text and 40 < len(both[1]) < 80


def test_invalid_bytes(tmp_path):
    bad = b"good text here\n" * 10 + b"bad \xff byte\n" + b"more\n" * 10
    source = write(tmp_path, bad)
    with pytest.raises(DataError, match=r"a\.txt: byte 154 \(0xff\) is not utf-8") as error:
        corpus_of(tmp_path, source=source)
    assert error.value.exit_code == 3
    replace = source.model_copy(update={"on_bad": "replace"})
    corpus = corpus_of(tmp_path, source=replace)
    both = "".join(corpus.tokenizer.decode(tokens(corpus, s)) for s in ("train", "val"))
    assert both == bad.decode("utf-8", "replace")
    said = []
    skip = source.model_copy(update={"on_bad": "skip", "separator": "\n"})
    corpus = corpus_of(tmp_path, source=skip, report=said.append, val_fraction=0.3)
    assert "bad" not in corpus.tokenizer.decode(tokens(corpus, "train"))
    assert said[-1:] == ["undecodable documents, left out: 1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n\x00\x00binary", "NUL byte at offset 6"),
        (None, "no such file"),
    ],
)
def test_files_that_are_no_text(tmp_path, content, message):
    path = tmp_path / "x.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        corpus_of(tmp_path, source=Text(path=(str(path),)))
    assert error.value.exit_code == 3


def test_small_files_share_a_part(tmp_path):
    for i in range(50):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i} " * 30)
    corpus = corpus_of(tmp_path, source=Text(path=(str(tmp_path / "*.txt"),)), val_fraction=0.2)
    assert len(corpus.manifest.shards["train"]) == 1
    documents = sum(corpus.manifest.total(split, "documents") for split in ("train", "val"))
    assert documents == 50


def test_tokenizer_file_is_hugging_faces(tmp_path):
    from tokenizers import Tokenizer

    settings = Bpe(vocab_size=300, special_tokens=("<end>", "<pad>"))
    corpus = corpus_of(tmp_path, source=Tales(stories=100), tokenizer=settings)
    file = Tokenizer.from_file(str(corpus.folder / "tokenizer.json"))
    assert file.encode("once").ids == corpus.tokenizer.encode("once").tolist()
    assert open_corpus(corpus.folder).tokenizer.end_of_text == file.token_to_id("<end>")


def test_folders_and_globs(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/c.md", ".hidden"):
        (tmp_path / "in" / name).write_text(f"{name} " * 30)
    corpus = corpus_of(tmp_path, source=Text(path=(str(tmp_path / "in"),)), split="tail")
    text = "".join(corpus.tokenizer.decode(tokens(corpus, s)) for s in ("train", "val"))
    assert text == "a.txt " * 30 + "b.txt " * 30 + "deep/c.md " * 30
    only = corpus_of(tmp_path, source=Text(path=(str(tmp_path / "in" / "*.txt"),)), split="tail")
    assert only.manifest.total("train", "documents") == 2
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no files in it"):
        corpus_of(tmp_path, source=Text(path=(str(tmp_path / "none"),)))


def test_empty_split_is_an_error(tmp_path):
    source = write(tmp_path, "one\n\ntwo\n\nthree").model_copy(update={"separator": "\n\n"})
    with pytest.raises(DataError, match="val split is empty"):
        corpus_of(tmp_path, source=source, val_fraction=0.0001, split="documents")
    tail = corpus_of(tmp_path, source=source, val_fraction=0.4)  # few documents: not by hash
    assert tail.manifest.spec["split"] == "tail"


def test_documents_of_large_files_stay_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("dtt.data.documents.PART_BYTES", 100)
    texts = {f"{i:02}.txt": "".join(f"{i} line {j}\n" for j in range(60)) for i in range(25)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    corpus = corpus_of(tmp_path, source=Text(path=(str(tmp_path / "*.txt"),)), val_fraction=0.3)
    end, found = corpus.tokenizer.end_of_text, []
    for split in ("train", "val"):
        stream = tokens(corpus, split)
        cuts = [i for i, t in enumerate(stream) if t == end]
        found += [corpus.tokenizer.decode(stream[a + 1 : b]) for a, b in pairwise(cuts)]
    assert sorted(found) == sorted(texts.values())


def test_changed_shards_are_noticed(tmp_path):
    corpus = corpus_of(tmp_path, source=Tales(stories=100), tokenizer=Byte())
    path = corpus.folder / corpus.manifest.shards["train"][0].file
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train-00000\.bin is damaged"):
        corpus_of(tmp_path, source=Tales(stories=100), tokenizer=Byte())


def test_tokenizer_from_a_file(tmp_path):
    made = corpus_of(tmp_path, source=Tales(stories=200), tokenizer=Bpe(vocab_size=400))
    file = TokenizerFile(path=made.folder)
    again = corpus_of(tmp_path, source=Tales(stories=300), tokenizer=file)
    assert again.manifest.tokenizer == made.manifest.tokenizer
    (again.folder / "tokenizer.json").write_text('{"dtt": "byte"}')
    with pytest.raises(DataError, match="not the tokenizer that made these tokens"):
        open_corpus(again.folder)


def test_broken_manifests_are_refused(tmp_path):
    folder = corpus_of(tmp_path, source=Tales(stories=100), tokenizer=Byte()).folder
    path = folder / "manifest.json"
    good = json.loads(path.read_text())
    for text, message in (
        ("{", "not a manifest"),
        ("[]", "not a manifest"),
        (json.dumps(good | {"format": 99}), "data format 99, this dtt reads 2"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_manifest(folder)
    path.unlink()
    with pytest.raises(DataError, match="dtt tokenize"):
        read_manifest(folder)


def test_document_ends(tmp_path):
    corpus = corpus_of(tmp_path, source=Tales(stories=50), tokenizer=Byte(), val_fraction=0.3)
    shard = corpus.manifest.shards["train"][0]
    path = corpus.folder / shard.file
    ends = np.fromfile(path.with_suffix(".docs"), "<u8")
    all_tokens = np.fromfile(path, "<u2")
    assert (np.flatnonzero(all_tokens == 256) + 1 == ends).all()
    assert storage.file_digest(path) == shard.sha256


def test_parts_of_another_size_are_not_mixed(tmp_path, monkeypatch):
    book = tmp_path / "book.txt"
    book.write_text("one line of text\n" * 400, encoding="utf-8")
    folders = set()
    for size in (1000, 5000):
        monkeypatch.setattr("dtt.data.documents.PART_BYTES", size)
        made = corpus_of(tmp_path, source=Text(path=(str(book),)), tokenizer=Byte())
        folders.add(made.folder.name)
        assert made.manifest.total("train", "bytes") + made.manifest.total("val", "bytes") == 6800
    assert len(folders) == 2


def test_a_large_corpus_has_larger_parts():
    assert part_bytes(10**6) == part_bytes(4 * 10**9) == 1 << 20
    assert part_bytes(40 * 10**9) == 10**7
    assert part_bytes(10**13) == 64 << 20
