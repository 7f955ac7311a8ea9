"""Remote files: a real S3 API, and an HTTP server that fails; the same documents as from here."""

import gzip
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dtt.config.data import Byte, Data
from dtt.config.sources import Records, Text
from dtt.data.preparation.prepare import prepare
from dtt.data.sources import open_source
from dtt.errors import ConfigError, DataError

fsspec = pytest.importorskip("fsspec")
parquet = pytest.importorskip("pyarrow.parquet")
import pyarrow as pa  # noqa: E402

TEXTS = [f"Text {i}, " + "and so on, " * (i % 50) for i in range(2000)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def texts(source, tail=0.0):
    reader = open_source(source)
    return [d.text for part in reader.parts(tail) for d in reader.read(part)]


def put_all(system, folder):
    """The same rows in each format, below a folder of a file system."""
    system.makedirs(folder, exist_ok=True)
    table = pa.table({"text": TEXTS})
    with system.open(f"{folder}/rows.parquet", "wb") as file:
        parquet.write_table(table, file, row_group_size=300)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    system.pipe(f"{folder}/rows.arrow", sink.getvalue().to_pybytes())
    system.pipe(f"{folder}/rows.jsonl", LINES)
    system.pipe(f"{folder}/rows.jsonl.gz", gzip.compress(LINES))
    system.pipe(f"{folder}/text.txt", "@@".join(TEXTS).encode())


@pytest.fixture(scope="module")
def s3():
    """Environment that leads to an S3 server with a bucket in this process."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "x")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        system = fsspec.filesystem("s3")
        system.mkdir("bucket")
        put_all(system, "bucket/deep")
        yield system
        fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    put_all(system, "/box")
    yield "memory://box"
    system.rm("/box", recursive=True)


ROWS = ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "rows.arrow"]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("tail", [0.0, 0.3])
def test_rows_in_s3_are_those_of_a_local_file(s3, monkeypatch, name, tail):
    monkeypatch.setattr("dtt.data.documents.PART_BYTES", 200_000)
    assert texts(Records(path=f"s3://bucket/deep/{name}"), tail) == TEXTS


def test_text_in_s3(s3, monkeypatch):
    monkeypatch.setattr("dtt.data.documents.PART_BYTES", 50_000)
    source = Text(path="s3://bucket/deep/text.txt", separator="@@")
    assert texts(source) == TEXTS
    assert len(open_source(source).parts(0.0)) > 5


def test_folders_and_globs_in_s3(s3):
    found = texts(Records(path="s3://bucket"))
    assert found == TEXTS * len(ROWS)  # and not the text
    assert texts(Records(path="s3://bucket/*/*.parquet")) == TEXTS
    assert texts(Records(path="s3://bucket/deep", format="jsonl")) == TEXTS * 2


@pytest.mark.processes
def test_s3_is_read_by_worker_processes(s3, tmp_path, monkeypatch):
    monkeypatch.setattr("dtt.data.documents.PART_BYTES", 100_000)
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    found = []
    for path in ("s3://bucket/deep/rows.jsonl", str(tmp_path / "rows.jsonl")):
        for workers in (1, 2):
            data = Data(source=Records(path=path), dir=tmp_path / "data", workers=workers)
            corpus = prepare(data, Byte(), force=True)
            manifest = (corpus.folder / "manifest.json").read_text()
            assert "canary" not in manifest and "127.0.0.1" not in manifest
            found.append([s.sha256 for s in corpus.manifest.shards["train"]])
    assert found[0] == found[1] and found[2] == found[3] and found[0] == found[2]


def test_a_change_in_s3_is_noticed(s3):
    source = Text(path="s3://bucket/deep/other.txt")
    prints = []
    for text in (b"one text", b"two text"):
        s3.pipe("bucket/deep/other.txt", text)
        s3.invalidate_cache()
        prints.append(open_source(source).fingerprint())
    s3.rm("bucket/deep/other.txt")
    assert prints[0] != prints[1]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/deep/none.jsonl", r"s3://bucket/deep/none\.jsonl: no such file"),
        ("s3://nobucket/x.jsonl", "no such file"),
        ("s3://bucket/*.arrow", r"no files there that can be read"),
        ("memory://none", "no such file"),
        ("sftpx://host/x.jsonl", "Protocol not known: sftpx"),
    ],
)
def test_what_is_not_there_is_named_at_once(s3, path, message):
    with pytest.raises(DataError, match=message):
        open_source(Records(path=path))


def test_memory_file_system(memory):
    for name in ROWS:
        assert texts(Records(path=f"{memory}/{name}")) == TEXTS


def test_a_package_that_a_protocol_needs_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"gcsfs.*pip install"):
        open_source(Records(path="gs://bucket/x.jsonl"))


class Failing(BaseHTTPRequestHandler):
    """Serves ranges of FILES; the first requests of each range fail in turn."""

    files: dict[str, bytes]
    failures: list[str]

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        data = self.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        failure = self.failures.pop(0) if asked and self.failures else ""
        if failure == "500":
            self.send_error(500)
            return
        start, stop = 0, len(data)
        if asked:
            low, _, high = asked.removeprefix("bytes=").partition("-")
            start, stop = int(low), min(int(high or stop) + 1, stop)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if body:
            half = (stop - start) // 2
            self.wfile.write(data[start : start + half if failure == "reset" else stop])
            if failure == "reset":
                self.close_connection = True


@pytest.fixture
def http(monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr("dtt.data.reading.files.PAUSE", 0.0)
    handler = type("Handler", (Failing,), {"files": {"/a.jsonl": LINES}, "failures": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_http_files_are_read_by_ranges(http, monkeypatch):
    monkeypatch.setattr("dtt.data.documents.PART_BYTES", 100_000)
    handler, address = http
    handler.files["/b.jsonl?x=1"] = LINES
    for path in ("a.jsonl", "b.jsonl?x=1"):
        reader = open_source(Records(path=f"{address}/{path}"))
        assert len(reader.parts(0.0)) > 3
        assert texts(Records(path=f"{address}/{path}")) == TEXTS


def test_failures_are_tried_again(http):
    handler, address = http
    source = Records(path=f"{address}/a.jsonl")
    handler.failures += ["500", "reset", "500", "reset"]
    assert texts(source) == TEXTS and not handler.failures
    handler.failures += ["500"] * 5
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read .*; check the address"):
        texts(source)
    with pytest.raises(DataError, match="no such file"):
        texts(Records(path=f"{address}/none.jsonl"))


def test_secrets_in_an_address_are_not_shown(http):
    _, address = http
    secret = address.replace("http://", "http://user:canary@")
    with pytest.raises(DataError) as error:
        texts(Records(path=f"{secret}/none.jsonl?token=canary"))
    assert "canary" not in str(error.value) and "none.jsonl" in str(error.value)
