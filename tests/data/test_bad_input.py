"""Bad input: `on_bad` decides, counts are exact, a message says where, memory stays bounded."""

import gzip
import io
import json
import random
import string
import subprocess
import sys
import tracemalloc

import pytest

from dtt.config.data import Byte, Data
from dtt.config.sources import Records, Text
from dtt.data.preparation.prepare import prepare
from dtt.data.reading.files import File, blocks
from dtt.data.reading.long_row import BadRowError, LongRow
from dtt.data.reading.spans import Separator, edges, spans
from dtt.data.sources import open_source
from dtt.errors import DataError
from dtt.tokenizer import BETWEEN_WORDS, slices_of, train_bpe

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

U = "\N{REPLACEMENT CHARACTER}"


def read(path, on_bad="error", kind=Records, **settings):
    """(documents, counts by reason) of a file."""
    reader = open_source(kind(path=str(path), on_bad=on_bad, **settings))
    found = [d for part in reader.parts(0.0) for d in reader.read(part)]
    return [d.text for d in found], dict(reader.bad)


def put(tmp_path, data, name="a.jsonl"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def row(text):
    return json.dumps({"text": text}).encode() + b"\n"


# One bad row between two good ones: (its bytes, where and what, reason, text after repair).
ROWS = {
    "invalid UTF-8": (
        b'{"text": "b\xffd"}\n',
        r"a\.jsonl: line 2 \(byte 17\): byte 28 \(0xff\) is not utf-8",
        "undecodable documents",
        f"b{U}d",
    ),
    "NUL": (b'{"text": "b\0d"}\n', "a NUL byte at offset 28", "documents with NUL", f"b{U}d"),
    "escaped NUL": (
        rb'{"text": "b\u0000d"}' + b"\n",
        r"line 2 \(byte 17\): the text has the character NUL",
        "documents with NUL",
        f"b{U}d",
    ),
    "lone surrogate": (
        rb'{"text": "\ud83d\ude00 b\ud800d"}' + b"\n",
        r"line 2 \(byte 17\): the text has half a UTF-16 pair",
        "documents with lone surrogates",
        f"\U0001f600 b{U}d",
    ),
    "no JSON": (
        b'{"text": "bad}\n',
        r"line 2 \(byte 17\): not JSON: Unterminated string .* \(column 10\); mend the line",
        "rows that are not JSON",
        None,
    ),
    "an array": (b'["b"]\n', "an object with fields, not list", "rows that are not objects", None),
    "deep": (b"[" * 200_000 + b"\n", "nested too deeply", "rows that are not JSON", None),
    "missing": (
        b'{"txt": "b", "n": 1}\n',
        r"no field text \(fields: txt, n\); name another data\.source\.field",
        "rows without text",
        None,
    ),
    "null": (b'{"text": null}\n', "text is null", "rows without text", None),
    "number": (b'{"text": 1.5}\n', "text is float, not text", "rows whose text is not text", "1.5"),
    "list": (b'{"text": ["b"]}\n', "text is list", "rows whose text is not text", '["b"]'),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_among_good_ones(tmp_path, name):
    bad, message, reason, repaired = ROWS[name]
    path = put(tmp_path, row("good") + bad + row("fine"))
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert error.value.exit_code == 3 and "on_bad" in error.value.fix
    assert read(path, "skip") == (["good", "fine"], {f"{reason}, left out": 1})
    texts, counts = read(path, "replace")
    if repaired is None:
        assert (texts, counts) == (["good", "fine"], {f"{reason}, left out": 1})
    else:
        assert (texts, counts) == (["good", repaired, "fine"], {f"{reason}, repaired": 1})


def test_a_missing_field_of_a_template_is_empty_when_repaired(tmp_path):
    path = put(tmp_path, b'{"a": "x", "b": "y"}\n{"b": "z"}\n')
    assert read(path, "replace", template="{a}-{b}")[0] == ["x-y", "-z"]
    assert read(path, "skip", template="{a}-{b}")[0] == ["x-y"]
    assert read(path, "replace", field="a") == (["x"], {"rows without a, left out": 1})


def test_json_that_is_one_array_is_named(tmp_path):
    path = put(tmp_path, b'[\n{"text": "a"},\n{"text": "b"}\n]\n', "a.json")
    with pytest.raises(DataError, match=r"line 1 .* one array, not one object per line"):
        read(path)


@pytest.mark.parametrize(("bad", "reason"), [(b"b\xffd", "undecodable"), (b"b\0d", "with NUL")])
def test_a_bad_cell_of_a_parquet_file(tmp_path, bad, reason):
    cells = pa.array([b"good", bad, None, b"fine"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": cells, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 1: "):
        read(tmp_path / "a.parquet")
    texts, counts = read(tmp_path / "a.parquet", "skip")
    assert texts == ["good", "fine"] and sum(counts.values()) == 2
    assert any(reason in name for name in counts)
    assert read(tmp_path / "a.parquet", "replace")[0] == ["good", f"b{U}d", "fine"]
    with pytest.raises(DataError, match=r"row 0: no field body \(fields: text, n\)"):
        read(tmp_path / "a.parquet", field="body")


BREAKS = {"jsonl.gz": gzip.compress, "jsonl.zst": lambda data: _zst(data)}


def _zst(data):
    return pytest.importorskip("backports.zstd").compress(data)


@pytest.mark.parametrize("kind", BREAKS)
def test_a_compressed_file_that_breaks_off(tmp_path, kind):
    rng = random.Random(0)  # not compressible, so that half of the bytes are half of the rows
    texts = [rng.randbytes(500).hex() for _ in range(2000)]
    packed = BREAKS[kind](b"".join(map(row, texts)))
    path = put(tmp_path, packed[: len(packed) // 2], f"a.{kind}")
    with pytest.raises(DataError, match=rf"a\.{kind}: damaged .* breaks off after [\d,]+ bytes"):
        read(path)
    found, counts = read(path, "skip")
    # The row in which it breaks off is no JSON.
    assert counts.pop("rests of damaged files, left out") == 1
    assert counts in ({}, {"rows that are not JSON, left out": 1})
    assert found == texts[: len(found)]
    assert 700 < len(found) <= 1000
    flipped = packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:]
    put(tmp_path, flipped, f"b.{kind}")
    if kind.endswith("gz"):  # its checksum; that of zstd is optional
        with pytest.raises(DataError, match="damaged"):
            read(tmp_path / f"b.{kind}")
    with pytest.raises(DataError, match="damaged"):
        read(put(tmp_path, b"plain text\n", f"c.{kind}"))


def test_a_parquet_file_that_breaks_off(tmp_path):
    table = pa.table({"text": [f"text {i} " * 50 for i in range(3000)]})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, row_group_size=500, write_page_checksum=True)
    whole = buffer.getvalue()
    put(tmp_path, whole, "b.parquet")
    put(tmp_path, whole[: len(whole) // 2], "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: not a whole parquet file: .*; get the file"):
        read(tmp_path)
    found, counts = read(tmp_path, "skip")
    assert len(found) == 3000 and counts == {"damaged files, left out": 1}
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path = put(tmp_path, bytes(flipped), "c.parquet")
    with pytest.raises(DataError, match=r"c\.parquet: not a whole parquet file"):
        read(path)
    found, counts = read(path, "skip")
    assert set(found) < set(table["text"].to_pylist()) and sum(counts.values()) >= 1


def test_empty_files(tmp_path):
    for kind, name in ((Records, "a.jsonl"), (Text, "a.txt")):
        with pytest.raises(DataError, match=r"no rows|the text is empty"):
            read(put(tmp_path, b"", name), kind=kind)
    put(tmp_path, row("x"), "b.jsonl")
    assert read(tmp_path, kind=Records) == (["x"], {})
    assert read(put(tmp_path, gzip.compress(b""), "c.jsonl.gz")) == ([], {})


def test_bad_text(tmp_path):
    text = b"\xef\xbb\xbfone\r\n\r\nt\xffwo\r\n\r\nthr\0ee\r\n\r\n\r\n\r\nfour\r\n"
    path = put(tmp_path, text, "a.txt")
    settings = {"kind": Text, "separator": "\n\n"}
    with pytest.raises(DataError, match=r"a\.txt: byte 11 \(0xff\) is not utf-8"):
        read(path, **settings)
    assert read(path, "skip", **settings) == (
        ["one", "four\r\n"],
        {"undecodable documents, left out": 1, "documents with NUL, left out": 1},
    )
    assert read(path, "replace", **settings)[0] == ["one", f"t{U}wo", f"thr{U}ee", "four\r\n"]
    assert read(put(tmp_path, b"a\r\nb\r\n", "b.txt"), kind=Text) == (["a\r\nb\r\n"], {})


def test_bad_bytes_of_other_encodings(tmp_path):
    good = "déjà vu\n".encode("utf-16-le")
    path = put(tmp_path, good + b"\x00\xd8" + good, "a.txt")
    settings = {"kind": Text, "encoding": "utf-16-le", "separator": "\n"}
    with pytest.raises(DataError, match=r"byte 16 \(0x00\) is not utf-16-le"):
        read(path, **settings)
    once = "undecodable documents"
    assert read(path, "skip", **settings) == (["déjà vu"], {f"{once}, left out": 1})
    assert read(path, "replace", **settings) == (
        ["déjà vu", f"{U}déjà vu"],
        {f"{once}, repaired": 1},
    )


def test_counts_reach_the_manifest_whatever_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("dtt.data.documents.PART_BYTES", 600)
    bad = [b'{"text": "\xff"}\n', b"no json\n", b'{"txt": ""}\n']
    path = put(tmp_path, b"".join(row(f"text {i} " * 9) + bad[i % 3] for i in range(60)))
    found, said = [], []
    for workers in (1, 2):
        data = Data(
            source=Records(path=str(path), on_bad="skip"), dir=tmp_path / "d", workers=workers
        )
        corpus = prepare(data, Byte(), force=True, report=said.append)
        found.append((corpus.manifest.bad, corpus.stream("train").read(0, 1 << 20).tolist()))
    assert found[0] == found[1]
    assert set(found[0][0].values()) == {20} and len(found[0][0]) == 3
    assert "rows that are not JSON, left out: 20" in said


def test_documents_longer_than_the_limit_come_in_pieces(tmp_path, monkeypatch):
    for place in ("text", "records"):
        monkeypatch.setattr(f"dtt.data.reading.{place}.LONGEST", 1000)
    rng = random.Random(1)
    texts = ["".join(rng.choices("ab é中 \n", k=k)) for k in (10, 5000, 900, 1000, 3000, 7)]
    packed = {
        "a.jsonl": b"".join(map(row, texts)),
        "b.jsonl": "".join(f'{{"text": {json.dumps(t, ensure_ascii=False)}}}\n' for t in texts),
        "c.jsonl.gz": gzip.compress(b"".join(map(row, texts))),
        "d.txt": "\0".join(texts).replace("\0", "@@"),
        "f.txt.gz": gzip.compress("@@".join(texts).encode()),
    }
    sources = []
    for name, data in packed.items():
        path = put(tmp_path, data.encode() if isinstance(data, str) else data, name)
        text = Text(path=str(path), separator="@@")
        sources.append(Records(path=str(path)) if "json" in name else text)
    parquet.write_table(pa.table({"text": texts}), tmp_path / "e.parquet")
    for source in (*sources, Records(path=str(tmp_path / "e.parquet"))):
        reader = open_source(source)
        found = [d for part in reader.parts(0.0) for d in reader.read(part)]
        assert max(len(d.text) for d in found) <= 1001
        whole, keys = [""], [set()]
        for document in found:
            whole[-1] += document.text
            keys[-1].add(document.identity)
            if document.ends:
                whole.append("")
                keys.append(set())
        assert whole[:-1] == texts
        assert {len(k) for k in keys[:-1]} == {1}  # all pieces go to the same split
        assert not reader.bad


def test_a_large_file_is_one_document_in_parts_of_one_split(tmp_path, monkeypatch):
    monkeypatch.setattr("dtt.data.reading.text.LONGEST", 1000)
    monkeypatch.setattr("dtt.data.documents.PART_BYTES", 3000)
    contents = {f"{i:02}.txt": f"{i} " + "word and " * (30 * i) for i in range(25)}
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    data = Data(source=Text(path=str(tmp_path)), dir=tmp_path / "d", workers=1, val_fraction=0.4)
    corpus = prepare(data, Byte())
    found = []
    for split in ("train", "val"):
        stream = corpus.stream(split)
        tokens = stream.read(1, len(stream)).tolist()
        text = corpus.tokenizer.decode([10 if t == 256 else t for t in tokens])
        found += text.splitlines()
    assert sorted(found) == sorted(contents.values())


@pytest.mark.parametrize("mark", [b"\n\n", b"\n", b"@@", b"a\nb"])
def test_spans_do_not_depend_on_blocks(mark):
    rng = random.Random(2)
    for _ in range(60):
        data = bytes(rng.choices(b"a\r\n@b \xc3\xa9", k=rng.randrange(300)))
        separator, whole = Separator(mark), None
        for size in (1, 2, 3, 7, 50, 1000):
            pieces = [data[i : i + size] for i in range(0, len(data), size)]
            found = list(spans(pieces, separator, 0, 40, True))
            assert all(data[s.offset : s.offset + len(s.raw)] == s.raw for s in found)
            whole = whole or found
            assert found == whole
        file = io.BytesIO(data)
        for place in edges(file, len(data), separator, 20, True)[1:-1]:
            assert separator.split(data[:place])[-1][0] == place  # it is behind a separator


LONG_ROWS = [
    (r'{"text": "a\"b\\ud83d\ud83d\ude00\n\u00e9", "x": 1}', 'a"b\\ud83d\U0001f600\né'),
    ('{"a": [1, {"text": "no"}, "]"], "b": -1.5e3, "c": null, "text": "x", "text": "y"}', "x"),
    ('  {"text" : "" , "t": true}  ', ""),
    (r'{"text": "\ud83dx\ude00"}', "\ud83dx\ude00"),
    ('{"text": 5}', "text is not text"),
    ('{"a": 1}', "has no text"),
    ("{}", "has no text"),
    ('{"text": "a', "does not end"),
    ('{"text": "a\nb"}', "does not end"),
    (r'{"text": "a\qb, and so on"}', "does not end"),
    ('{"text": "a"} {"text": "b"}', "more behind"),
    ('["text"]', "not JSON"),
    ('{"text" "a"}', "not JSON"),
    ('{"a": [1, 2, "text": "b"', "not JSON"),
]


@pytest.mark.parametrize(("line", "expected"), LONG_ROWS)
@pytest.mark.parametrize("size", [1, 2, 5, 13, 1000])
def test_long_rows_are_read_as_json_reads_them(line, expected, size):
    def chunks():
        return (line[i : i + size] for i in range(0, len(line), size))

    try:
        found = "".join(LongRow(chunks()).text_of("text"))
    except BadRowError as error:
        found = str(error)
        assert expected in found
    else:
        assert found == expected
        if line.count('"text"') == 1:
            assert found == json.loads(line)["text"]


def test_a_bad_row_too_long_to_hold_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("dtt.data.reading.records.LONGEST", 100)
    long = b'{"text": 5, "more": "' + b"x" * 500 + b'"}\n'
    path = put(tmp_path, row("a") + long + row("b"))
    with pytest.raises(DataError, match=r"line 2 \(byte 14\): more than .*: text is not text"):
        read(path)
    texts, counts = read(path, "skip")
    assert texts == ["a", "b"] and list(counts.values()) == [1]
    path = put(tmp_path, row("a" * 200) + row("b"), "b.jsonl")
    with pytest.raises(DataError, match=r"line 1 .* too long for a template"):
        read(path, template="{text}!")
    assert read(path, "skip", template="{text}!")[0] == ["b!"]


def test_a_file_that_expands_a_thousandfold_is_read_in_blocks(tmp_path):
    size = 64 << 20
    for ending, data in ((".gz", gzip.compress(bytes(size))), (".zst", _zst(bytes(size)))):
        path = put(tmp_path, data, f"a{ending}")
        assert len(data) < size / 900
        tracemalloc.start()
        total = sum(map(len, blocks(File(str(path), len(data), ""))))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert total == size and peak < 6 << 20


def test_slices_are_cut_where_the_pre_tokenizer_cuts():
    rng = random.Random(3)
    text = "".join(rng.choices(string.ascii_letters + "  \n\t'.1é中", k=20_000))
    slices = list(slices_of(text, 300))
    assert "".join(slices) == text and len(slices) > 40
    assert max(map(len, slices)) <= 600 and list(slices_of("x" * 700, 300)) == [
        "x" * 300,
        "x" * 400,
    ]
    tokenizer = train_bpe(iter([text]), 600, ["<end>"])
    parts = [i for part in slices for i in tokenizer.encode(part).tolist()]
    assert parts == tokenizer.encode(text).tolist()
    assert BETWEEN_WORDS.search("a  b\n\nc") is None


def test_tokenizers_library_gets_slices(monkeypatch):
    tokenizer = train_bpe(iter(["some words here " * 50]), 300, ["<end>"])
    text = "here some  words\n\n and more " * 500
    whole = tokenizer.encode(text).tolist()
    tokenizer._fast = None
    monkeypatch.setattr("dtt.tokenizer.SLICE", 100)
    monkeypatch.setattr("dtt.tokenizer.slices_of.__defaults__", (100,))
    assert tokenizer.encode(text).tolist() == whole
    assert tokenizer.encode("").tolist() == []


GIANTS = """
import sys
from pathlib import Path
from dtt.config.data import Bpe, Byte, Data
from dtt.config.sources import Records, Text
from dtt.data.preparation.prepare import prepare
from dtt.data.sources import open_source
folder = Path(sys.argv[1])

def tokenize(source, tokenizer):
    data = Data(source=source, dir=folder / "data", workers=1, split="tail", val_fraction=0.3)
    corpus = prepare(data, tokenizer)
    return sum(corpus.manifest.total(split, "bytes") for split in ("train", "val"))

def read(source):
    reader = open_source(source)
    return sum(len(d.utf8) for part in reader.parts(0.0) for d in reader.read(part))

print(tokenize(Text(path=str(folder / "word.txt")), Bpe(vocab_size=512)))
print(tokenize(Records(path=str(folder / "line.jsonl")), Byte()))
print(read(Text(path=str(folder / "line.jsonl"), separator="\\n")))
print(read(Text(path=str(folder / "bomb.txt.gz"))))
# Not ru_maxrss, which a process inherits from the one that started it.
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
print("torch" in sys.modules, peak >> 10)
"""


@pytest.mark.processes
@pytest.mark.thorough
def test_memory_is_bounded_whatever_the_input(tmp_path):
    """A word of 10 MB, which a tokenizer is trained on too, a line of 200 MB, and a bomb."""
    rng = random.Random(0)
    (tmp_path / "word.txt").write_text("".join(rng.choices(string.ascii_letters, k=10_000_000)))
    megabyte = ("word " * 1000 + "\\n") * 209
    with (tmp_path / "line.jsonl").open("w") as file:
        file.writelines(['{"text": "', *([megabyte] * 200), '"}\n{"text": "end"}\n'])
    with gzip.open(tmp_path / "bomb.txt.gz", "wb", 1) as file:
        for _ in range(200):
            file.write(b" " * (1 << 20))
    done = subprocess.run(
        [sys.executable, "-c", GIANTS, str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    *sizes, (torch, peak) = [line.split() for line in done.stdout.splitlines()]
    text, size = 200 * 209 * 5001 + 3, (tmp_path / "line.jsonl").stat().st_size
    assert sizes == [["10000000"], [str(text)], [str(size - 2)], [str(200 << 20)]]
    assert torch == "False" and int(peak) < 600


def test_rows_are_no_text(tmp_path):
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has rows, not text; set data\.source\.name"):
        open_source(Text(path=str(tmp_path)))


def test_a_text_of_blanks_is_refused_and_leaves_no_folder(tmp_path):
    path = put(tmp_path, b" \n\t " * 500, "blank.txt")
    data = Data(source=Text(path=(str(path),)), dir=tmp_path / "data", workers=1)
    with pytest.raises(DataError, match="only blanks; give a file with text"):
        prepare(data, Byte())
    assert not list((tmp_path / "data").glob("blank*"))
