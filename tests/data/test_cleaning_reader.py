"""Cleaning a whole corpus: the counts add up, and the bytes depend on nothing but the input."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import unicodedata
from itertools import pairwise

import numpy as np
import pytest

from dtt.cli import main
from dtt.config.cleaning import (
    ExactDedup,
    Length,
    NearDedup,
    RegexDrop,
    RegexReplace,
    Unicode,
    UserFunction,
)
from dtt.config.data import Byte, Char, Data
from dtt.config.sources import Tales, Text
from dtt.data import documents
from dtt.data.cleaning.reader import CleanedReader
from dtt.data.cleaning.scan import find_duplicates
from dtt.data.preparation.crew import Crew
from dtt.data.preparation.prepare import prepare
from dtt.data.preparation.workers import LocalWorkers
from dtt.data.progress import silent
from dtt.data.sources import open_source
from dtt.errors import DataError

WORDS = [f"w{i}" for i in range(500)]


def corpus_text(seed: int = 2, count: int = 400) -> list[str]:
    """Documents of which some are equal, some nearly, some short, some not normalised."""
    source = random.Random(seed)
    texts: list[str] = []
    for _ in range(count):
        kind = source.random()
        if texts and kind < 0.3:
            text = source.choice(texts)
        elif texts and kind < 0.6:
            words = source.choice(texts).split()
            words[source.randrange(len(words))] = source.choice(WORDS)
            text = " ".join(words)
        elif kind < 0.7:
            text = "short one"
        else:
            text = " ".join(source.choices(WORDS, k=source.randrange(40, 90)))
        texts.append(text.replace("w1", "e\u0301") if source.random() < 0.1 else text)
    return texts


def source_of(tmp_path, texts, **settings):
    path = tmp_path / "corpus.txt"
    path.write_bytes("\n\n".join(texts).encode())
    return Text(path=(str(path),), separator="\n\n", **settings)


STEPS = (Unicode(), ExactDedup(), Length(min_words=10), NearDedup(), RegexDrop(pattern=r"\bw77\b"))


def expected(texts):
    """What STEPS leave, one step after another over the whole corpus."""
    from test_cleaning_duplicates import repeated

    from dtt.data.cleaning.duplicates import NearDuplicates

    texts = [unicodedata.normalize("NFC", text) for text in texts]
    texts = list(dict.fromkeys(texts))
    texts = [text for text in texts if len(text.split()) >= 10]
    again = repeated(NearDuplicates(NearDedup()), texts)
    texts = [text for text, near in zip(texts, again, strict=True) if not near]
    return [text for text in texts if "w77" not in text.split()]


def read_all(reader, parts):
    return [document for part in parts for document in reader.read(part)]


def scan(reader, parts, workers=1, home=None):
    with Crew(home or reader.folder.parent) as crew:
        crew.meet("corpus", lambda: None)
        find_duplicates(reader, parts, crew, LocalWorkers(workers), silent)


@pytest.mark.parametrize("workers", [1, 3])
def test_all_steps_in_their_order(tmp_path, monkeypatch, workers) -> None:
    monkeypatch.setattr(documents, "PART_BYTES", 8000)
    texts = corpus_text()
    reader = CleanedReader(open_source(source_of(tmp_path, texts)), STEPS, tmp_path / "home")
    parts = reader.parts(0.0)
    assert len(parts) > 8
    scan(reader, parts, workers)
    found = [document.text for document in read_all(reader, parts)]
    assert found == expected(texts)
    removed = sum(count for key, count in reader.bad.items() if "removed" in key)
    assert len(found) + removed == len(texts)
    kinds = {key.split(":")[0] for key, count in reader.bad.items()}
    assert kinds == {f"cleaning {i + 1} {step.name}" for i, step in enumerate(STEPS)}


def digest(folder):
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def prepared(tmp_path, name, texts, *, workers=1, tokenizer=None, cleaning=STEPS, **settings):
    data = Data(
        source=source_of(tmp_path, texts),
        dir=tmp_path / name,
        workers=workers,
        cleaning=cleaning,
        **settings,
    )
    return prepare(data, tokenizer or Byte())


def texts_of(corpus):
    found = []
    for split in ("train", "val"):
        stream = corpus.stream(split)
        tokens = stream.read(0, len(stream))
        ends = np.flatnonzero(tokens == corpus.tokenizer.end_of_text)
        found += [corpus.tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in pairwise(ends)]
    return sorted(found)


def test_prepared_data_does_not_depend_on_workers_or_kills(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "PART_BYTES", 20_000)
    texts = corpus_text()
    first = prepared(tmp_path, "one", texts)
    assert texts_of(first) == sorted(expected(texts))
    several = prepared(tmp_path, "two", texts, workers=3)
    assert digest(first.folder) == digest(several.folder)
    decision = digest(tmp_path / "one" / "cleaning")
    assert list(decision) == ["decision.npz"] and decision == digest(tmp_path / "two" / "cleaning")

    class KilledError(BaseException):
        pass

    sign, killed = CleanedReader.sign, []

    def dies(self, part):
        if len(killed) < 3 and part.index == 2 * len(killed):
            killed.append(part.index)
            raise KilledError
        signed.append(part.index)
        sign(self, part)

    signed: list[int] = []
    monkeypatch.setattr(CleanedReader, "sign", dies)
    for _ in range(3):
        with pytest.raises(KilledError):
            prepared(tmp_path, "three", texts)
    third = prepared(tmp_path, "three", texts)
    assert digest(third.folder) == digest(first.folder)
    assert sorted(signed) == sorted(set(signed))  # none was read again
    before = len(signed)
    prepared(tmp_path, "three", texts, tokenizer=Char())
    assert len(signed) == before  # another tokenizer finds the decision


def test_the_manifest_counts_what_each_step_did(tmp_path) -> None:
    texts = corpus_text()
    manifest = prepared(tmp_path, "data", texts).manifest
    assert [step["name"] for step in manifest.cleaning] == [step.name for step in STEPS]
    assert manifest.bad == {}
    kept = sum(manifest.total(split, "documents") for split in ("train", "val"))
    assert kept + sum(step["removed"] for step in manifest.cleaning) == len(texts)
    unicode, exact, length, near, regex = manifest.cleaning
    assert unicode["changed"] == sum("\u0301" in text for text in texts)
    assert exact["reasons"] == {"a duplicate": exact["removed"]}
    normal = {unicodedata.normalize("NFC", text) for text in texts}
    assert length["reasons"] == {"fewer than 10 words": sum(len(t.split()) < 10 for t in normal)}
    assert near["removed"] > 20 and regex["removed"] > 0
    raw = json.loads((tmp_path / "data").glob("corpus*/manifest.json").__next__().read_text())
    assert raw["cleaning"][1] == exact


def test_other_steps_are_other_data(tmp_path) -> None:
    texts = corpus_text(count=60)
    folders = [
        prepared(tmp_path, "data", texts, cleaning=cleaning).folder.name
        for cleaning in ((), (Length(min_words=3),), (Length(min_words=4),), (Unicode(),))
    ]
    assert len(set(folders)) == 4


def test_the_tokenizer_learns_cleaned_text(tmp_path) -> None:
    texts = [f"some words {i} with an X" for i in range(50)]
    replace = (RegexReplace(pattern="X", replacement="Z"),)
    corpus = prepared(tmp_path, "data", texts, tokenizer=Char(), cleaning=replace)
    assert corpus.tokenizer.encode("Z").tolist() != corpus.tokenizer.encode("Q").tolist()
    assert corpus.tokenizer.encode("X").tolist() == corpus.tokenizer.encode("Q").tolist()


def test_the_floor_is_known_only_for_untouched_text(tmp_path) -> None:
    data = Data(source=Tales(stories=200), dir=tmp_path, workers=1, val_fraction=0.3)
    for cleaning, known in (
        ((Length(min_words=1),), True),
        ((Length(max_words=110),), False),
        ((RegexReplace(pattern="the", replacement="teh"),), False),
    ):
        manifest = prepare(data.model_copy(update={"cleaning": cleaning}), Byte()).manifest
        assert (manifest.ideal_bits("train") is not None) == known


def test_pieces_of_a_long_document(tmp_path, monkeypatch) -> None:
    """They are cleaned one by one; a document whose last piece is left out ends all the same."""
    monkeypatch.setattr(documents, "PART_BYTES", 100)
    monkeypatch.setattr("dtt.data.reading.text.LONGEST", 100)
    lines = [f"line {i} " + ("DROP " if i in (12, 29) else "keep ") + "x" * 40 for i in range(30)]
    texts = ["\n".join(lines), "A whole second document, which is not very long at all.", "end"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    settings = Text(path=(str(tmp_path / "*.txt"),))
    steps = (
        RegexDrop(pattern="DROP"),
        ExactDedup(),
        RegexReplace(pattern="keep", replacement="KEEP"),
    )
    reader = CleanedReader(open_source(settings), steps, tmp_path / "home")
    parts = reader.parts(0.0)
    scan(reader, parts)
    found = read_all(reader, parts)
    assert sum(document.ends for document in found) == 3
    text = "".join(document.text + "|" * document.ends for document in found)
    assert text.endswith("|" + texts[1] + "|" + texts[2] + "|")
    assert "DROP" not in text and "keep" not in text and text.count("KEEP") >= 20
    assert text.index("KEEP") < text.index("|")


def test_nothing_remains_of_a_document(tmp_path) -> None:
    texts = [text for i in range(10) for text in ("delete", f"keep this {i} delete", "delete ")]
    corpus = prepared(
        tmp_path, "d", texts, cleaning=(RegexReplace(pattern="delete"),), val_fraction=0.3
    )
    assert texts_of(corpus) == [f"keep this {i} " for i in range(10)]
    assert corpus.manifest.cleaning[0]["reasons"] == {"nothing remains": 20}


def test_readers_go_to_other_processes(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_step.py").write_text("def up(text): return text.upper()")
    steps = (*STEPS, UserFunction(function="own_step:up"))
    reader = CleanedReader(open_source(source_of(tmp_path, corpus_text())), steps, tmp_path / "h")
    parts = reader.parts(0.0)
    scan(reader, parts)
    here = [document.text for document in read_all(reader, parts)]
    again = pickle.loads(pickle.dumps(reader))
    assert [document.text for document in read_all(again, parts)] == here
    assert again.fingerprint() == reader.fingerprint()
    assert again.bad is again.source.bad


def test_a_function_that_fails_is_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad_step.py").write_text("def fail(text): return text[1000]")
    with pytest.raises(DataError, match="bad_step:fail failed with IndexError") as error:
        prepared(
            tmp_path,
            "d",
            corpus_text(),
            workers=2,
            cleaning=(UserFunction(function="bad_step:fail"),),
        )
    assert error.value.exit_code == 3 and "\n" not in str(error.value)


def test_a_mixture_is_cleaned_corpus_by_corpus(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = list(dict.fromkeys(corpus_text()))
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts + texts[:40]), encoding="utf-8")
    source = '{name: text, path: %s.txt, separator: "\\n\\n"}'
    (tmp_path / "mix.yaml").write_text(
        "data:\n  workers: 1\n  cleaning: [exact-dedup]\n  mixture:\n"
        + "".join(f"    - {{name: {name}, source: {source % name}}}\n" for name in ("a", "b"))
        + "tokenizer: {name: bpe, vocab_size: 300}\n"
    )
    assert main(["tokenize", "-c", "mix.yaml"]) == 0
    manifests = [json.loads(p.read_text()) for p in (tmp_path / "data").glob("*/manifest.json")]
    assert [m["cleaning"][0]["removed"] for m in manifests] == [40, 40]


def test_a_damaged_decision_is_one_line(tmp_path) -> None:
    texts = corpus_text(count=60)
    prepared(tmp_path, "d", texts)
    (path,) = (tmp_path / "d" / "cleaning").glob("*/decision.npz")
    for damaged in (path.read_bytes()[:-9], b"", b"rubbish"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"decision.npz is damaged; remove the folder"):
            prepared(tmp_path, "d", texts, tokenizer=Char())


@pytest.mark.processes
def test_a_killed_process_goes_on(tmp_path) -> None:
    texts = corpus_text()
    settings = source_of(tmp_path, texts)
    command = [sys.executable, "-c", KILLED, settings.path[0]]
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert subprocess.run([*command, str(whole)], check=False, timeout=60).returncode == 0
    for hit in (3, 5, 9):  # files of a part, of a later one, and of the decision
        points = {"DTT_ENABLE_FAILPOINTS": "1", "DTT_FAILPOINTS": f"storage.rename@hit={hit}:kill9"}
        killed = subprocess.run(
            [*command, str(pieces)], check=False, timeout=60, env=os.environ | points
        )
        assert killed.returncode == -signal.SIGKILL
    assert subprocess.run([*command, str(pieces)], check=False, timeout=60).returncode == 0
    for name in ("cleaning", "corpus*"):
        (one,), (other,) = whole.glob(name), pieces.glob(name)
        assert digest(one) == digest(other)


KILLED = """
import sys
from pathlib import Path
from dtt.config.cleaning import ExactDedup, NearDedup
from dtt.config.data import Byte, Data
from dtt.config.sources import Text
from dtt.data import documents
from dtt.data.preparation.prepare import prepare
documents.PART_BYTES = 40_000
source = Text(path=(sys.argv[1],), separator="\\n\\n")
steps = (ExactDedup(), NearDedup())
prepare(Data(source=source, dir=Path(sys.argv[2]), workers=1, cleaning=steps), Byte())
"""
