"""Corpora of a few rows, or of none: a tail split cuts the row it meets, refusals say why."""

import gzip
import json
import random
from pathlib import Path

import pytest

from dtt.config.cleaning import Decontaminate
from dtt.config.data import Byte, Data, TokenizerFile
from dtt.config.sources import Records, Text
from dtt.data.cleaning.decontamination import Decontamination
from dtt.data.documents import Document, Part
from dtt.data.preparation.crew import Crew
from dtt.data.preparation.encoding import held_out
from dtt.data.preparation.prepare import open_corpus, prepare
from dtt.data.reading.border import Border, border_of_lines, border_of_stream, border_of_table
from dtt.data.reading.records import LINE
from dtt.data.sources import open_source
from dtt.errors import DataError, StorageError

WORDS = ["one", "two", "three", "\u00e9", "\u4e2d\u6587", "", "seventeen"]
KINDS = ("jsonl", "jsonl.gz", "parquet", "arrow")


def store(folder: Path, texts: list[str], kind: str) -> Path:
    path, rows = folder / f"rows.{kind}", [{"text": text, "n": n} for n, text in enumerate(texts)]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    if kind.startswith("jsonl"):
        path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
        return path
    pa = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    write = parquet.write_table if kind == "parquet" else feather.write_feather
    write(pa.Table.from_pylist(rows), str(path))
    return path


def sides(path: Path, tail: float) -> dict[bool | None, str]:
    reader = open_source(Records(path=(str(path),)))
    found: dict[bool | None, str] = {False: "", True: ""}
    for part in reader.parts(tail):
        found[part.held_out] += "".join(document.text for document in reader.read(part))
    return found


def make(folder: Path, source: Records | Text, **settings: object) -> tuple[object, list[str]]:
    lines: list[str] = []
    data = Data(source=source, dir=folder / "data", workers=1, **settings)  # type: ignore[arg-type]
    return prepare(data, Byte(), report=lines.append), lines


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 9, 19])
@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.95])
def test_both_sides_of_a_few_rows_have_text(tmp_path, kind, rows, fraction):
    rng = random.Random(rows)
    texts = [" ".join(rng.choices(WORDS, k=60)) for _ in range(rows)]
    path = store(tmp_path, texts, kind)
    source = Records(path=(str(path),))
    corpus, lines = make(tmp_path, source, val_fraction=fraction)
    assert corpus.manifest.spec["split"] == "tail" and lines == []
    found = sides(path, fraction)
    assert found[False] + found[True] == "".join(texts)
    share = len(found[True]) / len("".join(texts))
    assert fraction / 2 <= share <= 2 * fraction
    assert corpus.manifest.total("val", "bytes") == len(found[True].encode())


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_row_is_cut_as_a_short_one(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("dtt.data.reading.records.LONGEST", 300)
    texts = ["short", " ".join(random.Random(1).choices(WORDS, k=2000))]
    path = store(tmp_path, texts, kind)
    found = sides(path, 0.05)
    assert found[False] + found[True] == "".join(texts)
    if kind.startswith("jsonl"):
        assert 0.04 < len(found[True]) / len("".join(texts)) < 0.06
    reader = open_source(Records(path=(str(path),)))
    ends = [[d.ends for d in reader.read(part)] for part in reader.parts(0.05)]
    assert ends[-1][-1] and ends[-2][-1] and sum(map(sum, ends)) == 3
    assert all(ends[-2][:-1]) is False and len(ends[-1]) < len(ends[-2])


def test_a_bad_row_that_is_cut_is_counted_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"word " * 99 + b'\xff end of the only row"}\n')
    corpus, lines = make(tmp_path, Records(path=(str(path),), on_bad="replace"), split="tail")
    assert lines == ["undecodable documents, repaired: 1"]
    assert corpus.manifest.total("val", "bytes") > 10


@pytest.mark.parametrize("block", [1, 3, 7, 1000])
def test_borders_are_those_of_the_lines(tmp_path, block):
    rng = random.Random(block)
    for _ in range(40):
        lines = [b"x" * rng.randrange(9) for _ in range(rng.randrange(1, 9))]
        data = b"\n".join(lines)
        path = tmp_path / "a"
        path.write_bytes(data)
        for place in range(len(data)):
            low = data.rfind(b"\n", 0, place) + 1
            end = data.find(b"\n", place) + 1 or len(data)
            blocks = [data[i : i + block] for i in range(0, len(data), block)]
            for most in (0, 2, 100):
                cut = Border(low, end, (place - low) / (end - low))
                expected = Border(end, end) if end - place <= most else cut
                assert border_of_stream(blocks, place, most) == expected
                with path.open("rb") as file:
                    assert border_of_lines(file, place, LINE, most) == expected


def test_borders_of_tables():
    assert border_of_table(300, 285.2, 7) == Border(285, 285)
    assert border_of_table(1, 0.95, 0.02) == Border(0, 1, 0.95)
    assert border_of_table(4, 3.0, 0.0) == Border(3, 3)
    assert border_of_table(3, 2.25, 0.1) == Border(2, 3, 0.25)


def test_a_share_of_validation_far_from_what_was_asked_is_said(tmp_path):
    texts = ["x" * 400, "y" * 40, "z" * 4]  # rows of Parquet are counted, not weighed
    _, lines = make(tmp_path, Records(path=(str(store(tmp_path, texts, "parquet")),)))
    assert len(lines) == 1
    assert lines[0].startswith("validation has 1 of 444 bytes (0.23%), not the 5.00% of data.val_")


def test_a_giant_that_a_hash_holds_out_is_said(tmp_path):
    texts = [f"short text {n}" for n in range(60)]
    source = Records(path=(str(store(tmp_path, texts, "jsonl")),))
    corpus, lines = make(tmp_path, source, split="documents")
    assert lines == [] and corpus.manifest.total("val", "documents")
    reader = open_source(source)
    part = Part(0, held_out=None)
    every = [d for p in reader.parts(0.0) for d in reader.read(p)]
    number = next(n for n, d in enumerate(every) if held_out(d, part, 0.05))
    giant = texts[number] + " " + "z" * 5000
    salted = (f"{giant} {n}" for n in range(1000))
    texts[number] = next(t for t in salted if held_out(Document(t), part, 0.05))
    source = Records(path=(str(store(tmp_path, texts, "jsonl")),))
    _, lines = make(tmp_path, source, split="documents")
    assert len(lines) == 1 and "of data.val_fraction" in lines[0]


def test_the_advice_leaves_out_what_is_so_already(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    with pytest.raises(DataError) as error:
        make(tmp_path, Text(path=(str(path),)))
    assert str(error.value) == (
        "the train split is empty (all text: 1 bytes, data.val_fraction 0.05, data.split tail); "
        "give more text, or another data.val_fraction"
    )


def test_a_corpus_of_which_nothing_is_left_is_refused_and_removed(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"some \xff text \xff")
    with pytest.raises(DataError) as error:
        make(tmp_path, Text(path=(str(path),), on_bad="skip"), val_fraction=0.5)
    assert str(error.value).startswith(
        "all text was left out (undecodable documents, left out: 1); mend the files"
    )
    assert list((tmp_path / "data").iterdir()) == []
    path.write_bytes(b"some \xff text, and more")
    with pytest.raises(DataError, match=r"^no text is left for the train split \(undecodable"):
        make(tmp_path, Text(path=(str(path),), on_bad="skip"), val_fraction=0.5)


def test_a_damaged_table_is_named_as_the_reason(tmp_path):
    path = store(tmp_path, ["a text"] * 30, "parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"^all text was left out \(damaged files, left out: 1\);"):
        make(tmp_path, Records(path=(str(path),), on_bad="skip"))


def test_a_folder_on_which_others_work_stays(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x")
    monkeypatch.setattr("dtt.data.preparation.crew.Crew.is_last", lambda crew: False)
    with pytest.raises(DataError, match="split is empty"):
        make(tmp_path, Text(path=(str(path),)))
    assert [p.name for p in (tmp_path / "data").glob("*/part-*.json")] == [
        "part-00000.json",
    ]


@pytest.mark.parametrize("damage", [None, b"{}", b"\xff", b"not json"])
def test_a_tokenizer_that_is_lost_is_made_again_with_force(tmp_path, damage):
    path = tmp_path / "a.txt"
    path.write_text("some text " * 99)
    corpus, _ = make(tmp_path, Text(path=(str(path),)))
    file = corpus.folder / "tokenizer.json"
    file.unlink() if damage is None else file.write_bytes(damage)
    with pytest.raises(DataError, match=r"tokenizer.*; run the same `dtt tokenize` with --force$"):
        open_corpus(corpus.folder)
    data = Data(source=Text(path=(str(path),)), dir=tmp_path / "data", workers=1)
    prepare(data, Byte(), force=True)
    with pytest.raises(DataError, match=r"nosuch\.json.*; check tokenizer\.path$"):
        prepare(data, TokenizerFile(path=tmp_path / "nosuch.json"))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_file_without_permission_is_a_storage_error(tmp_path, monkeypatch, kind):
    path = store(tmp_path, ["a text"] * 30, "jsonl" if kind == "txt" else kind)
    source = Text if kind == "txt" else Records

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dtt.data.reading.files.open", refuse, raising=False)
    if kind == "parquet":
        monkeypatch.setattr("pyarrow.parquet.ParquetFile", refuse)
    with pytest.raises(StorageError, match=r"rows\.\w+: permission denied; check the permissions"):
        make(tmp_path, source(path=(str(path),)))
    monkeypatch.setattr("os.stat", refuse)
    with pytest.raises(StorageError, match="permission denied; check the permissions"):
        open_source(source(path=(str(path),)))


def test_a_member_of_the_same_corpus_keeps_its_folder(tmp_path):
    def nothing() -> None:
        pass

    with Crew(tmp_path) as one, Crew(tmp_path) as other:
        assert not one.is_last()  # it has not come to any corpus
        one.meet("corpus", nothing)
        assert one.is_last()
        other.meet("corpus", nothing)
        assert not one.is_last()
        other.meet("another", nothing)
        assert one.is_last()


def test_evaluation_texts_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "eval.txt"
    path.write_text("some words " * 20)

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(StorageError, match=r"eval\.txt: Permission denied; check the permissions"):
        Decontamination(Decontaminate(path=(str(path),)))
