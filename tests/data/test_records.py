"""Rows of every format give the same documents, however they are stored and divided."""

import bz2
import gzip
import json
import lzma
import random
import sys

import pytest

from dtt.config.data import Byte, Data
from dtt.config.flags import ConfigParser
from dtt.config.sources import Records, Text
from dtt.data.preparation.prepare import prepare
from dtt.data.reading.rows import MISSING, field_of
from dtt.data.sources import open_source
from dtt.errors import ConfigError, DataError

pa = pytest.importorskip("pyarrow")
from pyarrow import ipc, parquet  # noqa: E402

rng = random.Random(0)
ALPHABET = 'abc déf \n\t"\\/ 中文 \U0001f600 xyz'
TEXTS = ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 400))) for _ in range(300)]
ROWS = [{"id": i, "text": text, "meta": {"title": f"T{i}"}} for i, text in enumerate(TEXTS)]


def zst(data):
    return pytest.importorskip("backports.zstd").compress(data)


def lines(rows=ROWS, escaped=False, end="\n"):
    return "".join(json.dumps(row, ensure_ascii=escaped) + end for row in rows).encode()


def arrow_stream(path, table, rows=40):
    with pa.OSFile(str(path), "wb") as sink, ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def saved_data_set(path, table):
    """As `datasets` 5 writes it (checked against the library itself below)."""
    path.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table.slice(0, 120), table.slice(120)), strict=True):
        arrow_stream(path / name, part)
    (path / "dataset_info.json").write_text("{}")
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))


def store(folder, kind):
    path, table = folder / f"rows.{kind}", pa.Table.from_pylist(ROWS)
    match kind:
        case "jsonl" | "ndjson":
            path.write_bytes(lines())
        case "escaped.jsonl":
            path.write_bytes(lines(escaped=True))
        case "crlf.jsonl":
            path.write_bytes(lines(end="\r\n"))
        case "bom.jsonl":
            path.write_bytes(b"\xef\xbb\xbf" + lines().rstrip())
        case "blank.jsonl":
            path.write_bytes(b"\n \n" + lines(end="\n\n"))
        case "jsonl.gz":
            cut = len(lines(ROWS[:100]))  # two members, as `cat a.gz b.gz` gives
            path.write_bytes(gzip.compress(lines()[:cut]) + gzip.compress(lines()[cut:]))
        case "jsonl.zst":
            path.write_bytes(zst(lines(ROWS[:100])) + zst(lines(ROWS[100:])))
        case "jsonl.bz2":
            path.write_bytes(bz2.compress(lines()))
        case "jsonl.xz":
            path.write_bytes(lzma.compress(lines()))
        case "parquet":
            parquet.write_table(table, path, row_group_size=64)
        case "dictionary.parquet":
            encoded = table.set_column(1, "text", table["text"].dictionary_encode())
            parquet.write_table(encoded, path)
        case "arrow":
            arrow_stream(path, table)
        case "feather.arrow":
            with pa.OSFile(str(path), "wb") as sink, ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=40)
        case "saved":
            saved_data_set(path, table)
    return str(path)


KINDS = [
    *("jsonl", "ndjson", "escaped.jsonl", "crlf.jsonl", "bom.jsonl", "blank.jsonl"),
    *("jsonl.gz", "jsonl.zst", "jsonl.bz2", "jsonl.xz"),
    *("parquet", "dictionary.parquet", "arrow", "feather.arrow", "saved"),
]


def texts(reader, tail=0.0, side=None):
    parts = [part for part in reader.parts(tail) if side is None or part.held_out is side]
    return [document.text for part in parts for document in reader.read(part)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [2 << 20, 1000])
def test_every_format_has_the_same_documents(tmp_path, monkeypatch, kind, step):
    monkeypatch.setattr("dtt.data.documents.PART_BYTES", step)
    reader = open_source(Records(path=store(tmp_path, kind)))
    assert texts(reader) == TEXTS
    assert reader.documents() in (None, len(TEXTS))
    assert not reader.bad
    whole = ("gz", "zst", "bz2", "xz", "dictionary.parquet")
    assert len(reader.parts(0.0)) > (3 if step == 1000 and not kind.endswith(whole) else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_tail_split_is_by_rows(tmp_path, kind, share):
    reader = open_source(Records(path=store(tmp_path, kind)))
    train, val = texts(reader, share, False), texts(reader, share, True)
    assert train + val == TEXTS
    assert abs(len(val) / len(TEXTS) - share) < (0.4 if kind == "saved" else 0.1)


def test_a_template_and_nested_fields(tmp_path):
    for kind in ("jsonl", "parquet", "saved"):
        (tmp_path / kind).mkdir()
        path = store(tmp_path / kind, kind)
        reader = open_source(Records(path=path, template="{meta.title}: {text}{{}}"))
        assert texts(reader) == [f"T{i}: {text}{{}}" for i, text in enumerate(TEXTS)]
        reader = open_source(Records(path=path, field="meta.title"))
        assert texts(reader) == [f"T{i}" for i in range(len(TEXTS))]


def test_fields_are_found_by_name_before_dots():
    row = {"a.b": 1, "a": {"b": 2, "c.d": {"e": 3}}}
    found = [field_of(row, name) for name in ("a.b", "a.c.d.e", "a.x", "b", "a.b.c")]
    assert found == [1, 3, MISSING, MISSING, MISSING]


def test_folders_and_globs_hold_only_rows(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "README.md").write_text("no rows")
    (tmp_path / "b.jsonl").write_bytes(lines(ROWS[:2]))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[2:4])))
    parquet.write_table(pa.Table.from_pylist(ROWS[4:6]), tmp_path / "deep" / "c.parquet")
    found = texts(open_source(Records(path=str(tmp_path))))
    assert found == TEXTS[2:4] + TEXTS[:2] + TEXTS[4:6]
    assert texts(open_source(Records(path=str(tmp_path), format="parquet"))) == TEXTS[4:6]
    assert texts(open_source(Records(path=str(tmp_path / "*.jsonl")))) == TEXTS[:2]
    with pytest.raises(DataError, match=r"no such file, folder or glob"):
        open_source(Records(path=str(tmp_path / "*.arrow")))
    with pytest.raises(DataError, match=r"README\.md: its name does not say its format; set data"):
        open_source(Records(path=str(tmp_path / "README.md")))
    assert texts(open_source(Records(path=str(tmp_path / "b.jsonl"), format="jsonl"))) == TEXTS[:2]


def test_a_data_set_that_the_library_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(str(tmp_path / "one"), num_shards=3)
    assert texts(open_source(Records(path=str(tmp_path / "one")))) == TEXTS
    datasets.DatasetDict(train=made, test=made).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(DataError, match=r"splits test, train; choose one: .*dict/test"):
        open_source(Records(path=str(tmp_path / "dict")))
    assert texts(open_source(Records(path=str(tmp_path / "dict" / "train")))) == TEXTS


def test_a_saved_data_set_names_files_in_its_own_folder_only(tmp_path):
    path = tmp_path / "set"
    saved_data_set(path, pa.Table.from_pylist(ROWS))
    arrow_stream(tmp_path / "secret.arrow", pa.Table.from_pylist(ROWS))
    (path / "state.json").write_text('{"_data_files": [{"filename": "../secret.arrow"}]}')
    with pytest.raises(DataError, match="not the state of a saved data set"):
        open_source(Records(path=str(path)))


@pytest.mark.processes
def test_tokens_do_not_depend_on_workers_or_format(tmp_path, monkeypatch):
    monkeypatch.setattr("dtt.data.documents.PART_BYTES", 20_000)
    found = []
    for kind in ("jsonl", "jsonl.gz", "parquet", "arrow"):
        path = store(tmp_path, kind)
        for workers in (1, 2):
            folder = tmp_path / f"{kind}-{workers}"
            data = Data(source=Records(path=path), dir=folder, workers=workers)
            corpus = prepare(data, Byte())
            streams = [corpus.stream(split) for split in ("train", "val")]
            found.append([stream.read(0, len(stream)).tolist() for stream in streams])
    assert all(tokens == found[0] for tokens in found)


def test_compressed_text_is_text(tmp_path):
    text = "one\n\ntwo\n\nthrée\n" * 50
    for name, data in {
        "a.txt.gz": gzip.compress(text.encode()),
        "a.txt.zst": zst(text.encode()),
        "a.txt.xz": lzma.compress(text.encode("utf-16")),
    }.items():
        (tmp_path / name).write_bytes(data)
        encoding = "utf-16" if name.endswith("xz") else "utf-8"
        source = Text(path=str(tmp_path / name), encoding=encoding)
        assert texts(open_source(source)) == [text]
        train = "".join(texts(open_source(source), 0.1, False))
        assert train + "".join(texts(open_source(source), 0.1, True)) == text
        assert abs(len(train) / len(text) - 0.9) < 0.01
        split = source.model_copy(update={"separator": "\n\n"})
        assert texts(open_source(split)) == text.split("\n\n")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "{}"}, "only plain {field} names"),
        ({"template": "{a!r}"}, "only plain"),
        ({"template": "{a:>9}"}, "only plain"),
        ({"template": "{a"}, "template '{a'"),
        ({"template": "a"}, "names no {field}"),
        ({"template": "{a}", "field": "b"}, "give field or template, not both"),
        ({"field": ""}, "must not be empty"),
    ],
)
def test_settings_that_say_nothing(settings, message):
    with pytest.raises(ValueError) as error:
        Records(path="x.jsonl", **settings)
    assert message in str(error.value)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    path = store(tmp_path, "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"rows\.parquet needs the package pyarrow; pip install"):
        open_source(Records(path=path)).parts(0.0)


@pytest.mark.parametrize(
    ("line", "name", "paths"),
    [
        ("--data-path a.jsonl", "records", ("a.jsonl",)),
        ("--data-path a.jsonl.gz b.parquet", "records", ("a.jsonl.gz", "b.parquet")),
        ("--data-path s3://bucket/*.jsonl.zst", "records", ("s3://bucket/*.jsonl.zst",)),
        ("-d a.arrow", "records", ("a.arrow",)),
        ("-d rows", "records", ("rows",)),
        ("-d mixed", "text", ("mixed",)),
        ("-d saved", "records", ("saved",)),
        ("--data-path a.txt", "text", ("a.txt",)),
        ("--data-path a.txt.gz", "text", ("a.txt.gz",)),
    ],
)
def test_paths_choose_their_source(tmp_path, monkeypatch, line, name, paths):
    monkeypatch.chdir(tmp_path)
    for file in (
        "rows/a.jsonl",
        "rows/b.parquet",
        "mixed/a.jsonl",
        "mixed/b.md",
        "saved/state.json",
    ):
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.touch()
    parser = ConfigParser("dtt tokenize", "", ())
    config = parser.config(parser.parse(line.split()))
    assert (config.data.source.name, config.data.source.path) == (name, paths)
    # Characters are for small texts; rows are trained with BPE.
    assert config.tokenizer.name == ("char" if "a.txt" in line else "bpe")


def test_rows_and_text_together_are_refused():
    parser = ConfigParser("dtt tokenize", "", ())
    with pytest.raises(ConfigError, match=r"--data-path: a\.jsonl has rows, b\.txt is text"):
        parser.config(parser.parse(["--data-path", "a.jsonl", "b.txt"]))


def test_a_template_on_the_command_line():
    parser = ConfigParser("dtt tokenize", "", ())
    line = ["--data-path", "a.jsonl", "--data.source.template", r"{title}\n\n{text}"]
    assert parser.config(parser.parse(line)).data.source.template == "{title}\n\n{text}"
