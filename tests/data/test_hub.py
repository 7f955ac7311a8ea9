"""Data sets of the Hub and files at URLs: the files that `datasets` means, once, and without the
network afterwards; what is refused says how to mend it."""

from __future__ import annotations

import gzip
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Fault, serving
from hub_server import Hub as Server
from small_hub import rows, small_hub

from dtt.config.flags import ConfigParser, is_hub_name
from dtt.config.remote import Hub, Url
from dtt.data.remote.reader import RemoteReader, download, select, whole_documents
from dtt.data.sources import open_source
from dtt.errors import DataError


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with small_hub(tmp_path, monkeypatch) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "downloads"


def names(settings: Hub, folder: Path) -> list[str]:
    selection = select(settings, folder)
    home = folder / "hub" / settings.dataset.replace("/", "--")
    return [file.path.relative_to(home / file.revision).as_posix() for file in selection.files]


def texts(settings: Hub | Url, folder: Path) -> list[str]:
    return list(whole_documents(RemoteReader(settings, folder)))


# --- which files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "config", "split"),
    [
        ("org/web", None, "train"),
        ("org/web", "sample-10BT", "train"),
        ("org/web", "two", "train"),
        ("org/web", "two", "test"),
        ("org/mono", None, "train"),
        ("org/mono", None, "test"),
        ("org/plain", None, "train"),
    ],
)
def test_the_files_are_those_of_load_dataset(
    server: Server, folder: Path, dataset: str, config: str | None, split: str
) -> None:
    import datasets

    ours = select(Hub(dataset=dataset, config=config, split=split), folder)
    paths = [str(path) for path in download(Hub(dataset=dataset), ours)]
    theirs = datasets.load_dataset(dataset, config, split=split)
    kind = "text" if paths[0].endswith(".txt") else "json"
    local = datasets.load_dataset(kind, data_files=paths, split="train")
    assert local["text"] == theirs["text"]


def test_files_may_be_named(server: Server, folder: Path) -> None:
    settings = Hub(dataset="org/web", files=("sample/*/0.jsonl", "extra/*"))
    assert names(settings, folder) == ["extra/t.jsonl", "sample/10BT/0.jsonl"]
    with pytest.raises(DataError, match=r"has no file nope\*; it has README.md, data/a.jsonl"):
        select(Hub(dataset="org/web", files=("nope*",)), folder)


def test_every_file_is_verified_by_the_hash_of_its_kind(server: Server, folder: Path) -> None:
    first, second = select(Hub(dataset="org/web"), folder).files
    assert (first.sha256, len(first.blob or "")) == (None, 40)
    assert (len(second.sha256 or ""), second.blob) == (64, None)
    assert (first.size, second.size) == (len(rows("aa", "ab")), len(rows("ba" * 2000, "bb")))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"dataset": "org/none"},
            r"there is no data set org/none at http.*\(and no such file here\)",
        ),
        ({"dataset": "org/web", "revision": "v9"}, "org/web has no revision 'v9'"),
        ({"dataset": "org/web", "split": "dev"}, "no split 'dev'; .*one of: train"),
        ({"dataset": "org/web", "config": "big"}, r"big.*sample-10BT.*data\.source\.config"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(
    server: Server, folder: Path, settings: dict[str, Any], line: str
) -> None:
    with pytest.raises(DataError, match=line) as caught:
        select(Hub(**settings), folder)
    assert "\n" not in str(caught.value)


def test_faults_of_the_interface_are_tried_again(server: Server, folder: Path) -> None:
    server.faults = [
        Fault("/api/datasets/org/web", status=503),
        Fault("/api/datasets/org/web", status=500),
        Fault("/api/datasets/org/web", drop=True),
        Fault("paths-info", method="POST", status=502),
        Fault("resolve/.*README", status=500),
        Fault("resolve/.*jsonl", status=500),
        Fault("resolve/.*jsonl", status=429, retry_after="0"),
    ]
    assert texts(Hub(dataset="org/mono", split="test"), folder) == ["four"]
    selection = select(Hub(dataset="org/web"), folder)
    download(Hub(dataset="org/web"), selection)
    assert all(file.record() for file in selection.files)
    assert not any(fault.times for fault in server.faults)


# --- gated sets and secrets ----------------------------------------------------------------------


def test_a_gated_set_says_how_to_log_in(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.gated["org/mono"] = "hf_canary"
    settings = Hub(dataset="org/mono", files=("train.txt",))
    with pytest.raises(DataError, match=r"ask at .*/datasets/org/mono, then log in with `hf"):
        texts(settings, folder)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(
        DataError, match=r"your token has no access to it yet; ask for it at .*mono"
    ):
        texts(settings, folder)
    assert not list(folder.rglob("train.txt"))
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    assert texts(settings, folder) == ["one\n\ntwo\n\nthree"]
    kept = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert kept and not any(b"hf_canary" in data for data in kept)


@pytest.mark.parametrize("has_cause", [True, False])
def test_a_token_that_is_not_let_in_is_told_from_a_wrong_name(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch, has_cause: bool
) -> None:
    import datasets

    server.gated["org/web"] = "hf_canary"
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    if not has_cause:  # as `datasets` says it where it has lost what happened

        def refuse(*_: object, **__: object) -> None:
            raise datasets.exceptions.DatasetNotFoundError(
                "Dataset 'org/web' is a gated dataset on the Hub."
            )

        monkeypatch.setattr("datasets.load_dataset_builder", refuse)
    with pytest.raises(DataError, match=r"org/web is gated, and the account of your token has no"):
        texts(Hub(dataset="org/web"), folder)


def test_the_token_does_not_go_to_the_storage_host(
    server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    server.add("files/train.txt", b"one\n\ntwo\n\nthree")
    with serving(tmp_path / "server") as storage:
        server.faults = [Fault("resolve/.*txt", redirect=f"{storage.url}/files/train.txt")]
        assert texts(Hub(dataset="org/mono", files=("train.txt",)), folder)
        asked = [request.token for request in server.requests if "resolve" in request.path]
        assert asked == ["Bearer hf_canary"]
        assert [request.token for request in storage.requests] == [None]


def test_a_path_out_of_the_folder_is_refused(folder: Path) -> None:
    from dtt.data.remote.hub import _inside

    for name in ("../x", "/etc/x", "a/../../x", ""):
        with pytest.raises(DataError, match="outside"):
            _inside(folder, name)
    assert _inside(folder, "a/b.txt") == folder / "a/b.txt"


# --- once, and offline ---------------------------------------------------------------------------


def test_what_is_here_needs_no_network(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Hub(dataset="org/mono", separator="\n\n")
    assert texts(settings, folder) == ["one", "two", "three"]
    before = len(server.requests)
    fingerprint = RemoteReader(settings, folder).fingerprint()
    assert len(server.requests) == before
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert texts(settings, folder) == ["one", "two", "three"]
    assert RemoteReader(settings, folder).fingerprint() == fingerprint
    with pytest.raises(DataError, match=r"org/mono \(test\) is not in .*run `dtt download"):
        texts(Hub(dataset="org/mono", split="test"), folder)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    next(folder.rglob("train.txt")).unlink()
    with pytest.raises(DataError, match="1 of 1 files are not here, and the network"):
        texts(settings.model_copy(update={"offline": True}), folder)


def test_a_mirror_gives_the_same_files(
    server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Hub(dataset="org/plain", files=("corpus/*",))
    assert len(texts(settings, folder)) == 2
    next(folder.rglob("y.txt")).unlink()
    with serving(tmp_path / "server") as mirror:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", mirror.url)
        assert len(texts(settings, folder)) == 2
        assert [r.path.rpartition("/")[2] for r in mirror.requests] == ["y.txt"]


def test_a_selection_stays_until_it_is_updated(server: Server, folder: Path) -> None:
    settings = Hub(dataset="org/mono")
    assert texts(settings, folder) == ["one\n\ntwo\n\nthree"]
    server.add("datasets/org/mono/train.txt", b"new")
    old = RemoteReader(settings, folder)
    assert list(whole_documents(old)) == ["one\n\ntwo\n\nthree"]
    select(settings, folder, update=True)
    new = RemoteReader(settings, folder)
    assert list(whole_documents(new)) == ["new"]
    assert new.fingerprint() != old.fingerprint()


# --- limits --------------------------------------------------------------------------------------


def test_max_bytes_takes_the_first_files_that_fit(server: Server, folder: Path) -> None:
    settings = {"dataset": "org/plain", "files": ("corpus/*",)}
    assert names(Hub(max_bytes=3010, **settings), folder) == ["corpus/x.txt", "corpus/y.txt"]
    assert names(Hub(max_bytes="3KB", **settings), folder) == ["corpus/x.txt"]
    with pytest.raises(DataError, match=r"first file alone has 3.0 kB, .*max_bytes is 2.0 kB"):
        select(Hub(max_bytes=2000, **settings), folder)


def test_max_documents_downloads_no_more_than_they_need(server: Server, folder: Path) -> None:
    settings = Hub(dataset="org/plain", files=("corpus/*",), max_documents=1)
    assert texts(settings, folder) == ["x" * 3000]
    assert server.sent("x.txt") == 3000 and server.sent("y.txt") == 0
    before = len(server.requests)
    assert texts(settings, folder) == ["x" * 3000] and len(server.requests) == before
    assert texts(settings.model_copy(update={"max_documents": 9}), folder)[1:] == ["y" * 10]


def test_fewer_documents_than_are_here_need_no_network(server: Server, folder: Path) -> None:
    settings = Hub(dataset="org/web", config="sample-10BT", max_documents=2)
    assert texts(settings, folder) == ["sa", "sb"]
    offline = settings.model_copy(update={"offline": True})
    before = len(server.requests)
    assert texts(offline.model_copy(update={"max_documents": 1}), folder) == ["sa"]
    # The whole first file is here; the second one, which the third document needs, is not.
    with pytest.raises(DataError, match=r"the first 3 documents are not here \(the first 2 are\)"):
        texts(offline.model_copy(update={"max_documents": 3}), folder)
    assert "jsonl" not in "".join(request.path for request in server.requests[before:])


def test_the_first_rows_of_a_large_parquet_file_come_alone(server: Server, folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    texts_ = [random.Random(n).randbytes(5000).hex() for n in range(2000)]
    path = server.root / "datasets/org/plain/big.parquet"
    parquet.write_table(pyarrow.table({"text": texts_}), path, row_group_size=100)
    settings = Hub(dataset="org/plain", files=("big.parquet",), max_documents=120)
    server.faults = [Fault("big.parquet", 2, status=503)]
    assert texts(settings, folder) == texts_[:120]
    assert server.sent("big.parquet") < 0.5 * path.stat().st_size
    before = len(server.requests)
    assert texts(settings, folder) == texts_[:120] and len(server.requests) == before


def test_rows_are_read_by_field_and_template(server: Server, folder: Path) -> None:
    assert texts(Hub(dataset="org/web", config="sample-10BT"), folder) == ["sa", "sb", "sc", "sd"]
    settings = Hub(dataset="org/web", config="sample-10BT", template="{title}: {text}")
    assert texts(settings, folder)[:2] == ["s: sa", "s: sb"]
    assert texts(settings.model_copy(update={"max_documents": 3}), folder) == [
        "s: sa",
        "s: sb",
        "s: sc",
    ]


def test_formats_that_are_not_read_are_refused(server: Server, folder: Path) -> None:
    server.add("datasets/org/plain/corpus/z.csv", b"a,b\n")
    with pytest.raises(DataError, match=r"z\.csv: not a text file, or not of the same format"):
        RemoteReader(Hub(dataset="org/plain", files=("corpus/*",)), folder)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("roneneldan/TinyStories", True),
        ("HuggingFaceFW/fineweb-edu", True),
        ("books/novel.txt", False),
        ("rows/part.jsonl.gz", False),
        ("books/*", False),
        ("a/b/c", False),
        ("tests/data", False),  # which is here
        ("./books/novel", False),
    ],
)
def test_names_of_the_hub_are_told_from_files(
    name: str, is_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tests/data").mkdir(parents=True)
    assert is_hub_name(name) == is_one


@pytest.mark.parametrize("name", ["fineweb-edu", "wikipedia", "tinystories"])
def test_the_shipped_data_sets_are_found_by_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    parser = ConfigParser("dtt download", "", ())
    source = parser.config(parser.parse(["-d", name, "--max-bytes", "1.5GB"])).data.source
    assert isinstance(source, Hub) and source.max_bytes == 1_500_000_000


# --- URLs ----------------------------------------------------------------------------------------


def test_urls_are_downloaded_once_and_verified(server: Server, folder: Path) -> None:
    one, two = b"one\n\ntwo", gzip.compress(b"three")
    server.add("files/a/book.txt", one)
    server.add("files/b/book.txt", b"other")
    urls = (f"{server.url}/files/a/book.txt", f"{server.url}/files/b/book.txt")
    digests = tuple(hashlib.sha256(data).hexdigest() for data in (one, b"other"))
    settings = Url(urls=urls, sha256=digests, separator="\n\n")
    assert texts(settings, folder) == ["one", "two", "other"]
    before = len(server.requests)
    assert texts(settings.model_copy(update={"offline": True}), folder) == ["one", "two", "other"]
    assert len(server.requests) == before
    server.add("files/c.txt", two)
    with pytest.raises(DataError, match="SHA-256 is"):
        texts(Url(urls=(f"{server.url}/files/c.txt",), sha256=("0" * 64,)), folder)
    assert not list(folder.rglob("c.txt"))


def test_what_a_url_lacks_is_said_with_its_own_settings(server: Server, folder: Path) -> None:
    server.add("files/evil.zip", b"PK")
    with pytest.raises(DataError, match=r"evil\.zip: not a text file.*\(data\.source\.urls\)"):
        texts(Url(urls=(f"{server.url}/files/evil.zip",)), folder)
    with pytest.raises(DataError, match="HTTP status 404"):
        texts(Url(urls=(f"{server.url}/files/nope.jsonl",)), folder)
    assert not list(folder.rglob(".nope*"))


def test_open_source_knows_remote_sources(server: Server, tmp_path: Path) -> None:
    source = open_source(Hub(dataset="org/mono", split="test"), tmp_path / "data")
    assert list(whole_documents(source)) == ["four"]
    assert (tmp_path / "data/downloads/hub/org--mono").is_dir()
