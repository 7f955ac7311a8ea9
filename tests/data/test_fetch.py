"""Downloads: faults of every kind end with the right bytes or one line, and nothing comes twice."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Fault, Hub, serving

from dtt.data.remote.fetch import Fetcher, _Redirects
from dtt.data.remote.partial import Record, RemoteFile, beside, shown
from dtt.data.remote.retries import TRIES, retry_after
from dtt.data.remote.transfer import Meter, bring, size_text, time_text
from dtt.errors import DataError

DATA = random.Random(1).randbytes(1_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
BLOB = hashlib.sha1(b"blob %d\0" % len(DATA) + DATA).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serving(tmp_path / "server") as hub:
        hub.add("files/data.bin", DATA)
        yield hub


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def fetcher(waits: list[float]) -> Fetcher:
    return Fetcher({"Authorization": "Bearer canary"}, timeout=0.5, pause=waits.append)


def remote(hub: Hub, tmp_path: Path, **known: Any) -> RemoteFile:
    return RemoteFile(f"{hub.url}/files/data.bin", tmp_path / "here" / "data.bin", **known)


def is_clean(file: RemoteFile) -> bool:
    """The file is whole, recorded, and nothing else is left."""
    names = {path.name for path in file.path.parent.iterdir() if path.suffix != ".tmp"}
    record = file.record()
    return (
        file.path.read_bytes() == DATA
        and record is not None
        and (record.size, record.sha256) == (len(DATA), SHA256)
        and names == {"data.bin", ".data.bin.json"}
    )


# --- faults --------------------------------------------------------------------------------------

FAULTS = {
    "none": ([], 1.0),
    "500 and 503": ([Fault("data", status=500), Fault("data", status=503)], 1.0),
    "reset before an answer": ([Fault("data", 3, drop=True)], 1.0),
    "short bodies": ([Fault("data", cut=300_000), Fault("data", cut=300_000)], 1.0),
    "short, then no ranges": ([Fault("data", cut=600_000), Fault("data", no_range=True)], 1.6),
    "stall": ([Fault("data", cut=500_000, stall=0.8)], 1.0),
    "length unknown": ([Fault("data", chunked=True)], 1.0),
    "a flipped bit": ([Fault("data", flip=True)], 2.0),
    "a flipped bit in a part": ([Fault("data", flip=True, cut=600_000)], 2.0),
}


@pytest.mark.parametrize(("faults", "share"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("known", [{"sha256": SHA256}, {"size": len(DATA), "blob": BLOB}])
def test_faults_end_with_the_right_bytes(
    hub: Hub,
    tmp_path: Path,
    fetcher: Fetcher,
    faults: list[Fault],
    share: float,
    known: dict[str, Any],
) -> None:
    hub.faults = [Fault(**vars(fault)) for fault in faults]
    came: list[int] = []
    file = remote(hub, tmp_path, **known)
    fetcher.fetch(file, came.append)
    assert is_clean(file)
    assert sum(came) == len(DATA)  # what came in vain is taken back
    assert hub.sent("data") == pytest.approx(share * len(DATA), rel=1e-3)
    before = len(hub.requests)
    fetcher.fetch(file)
    assert len(hub.requests) == before  # finished: no question is asked


def test_without_a_known_hash_a_change_on_the_server_starts_again(
    hub: Hub, tmp_path: Path, fetcher: Fetcher
) -> None:
    hub.faults = [Fault("data", TRIES, cut=0)]
    file = remote(hub, tmp_path)
    with pytest.raises(DataError):
        fetcher.fetch(file)
    part = beside(file.path, "part")
    part.write_bytes(bytes(500_000))  # of an older version: the record has its ETag
    record = Record.read(file.path)
    assert record is not None and record.validator
    old = Record(record.url, size=len(DATA), validator='"older"')
    old.write(file.path)
    fetcher.fetch(file)
    assert is_clean(file)


def test_each_byte_that_comes_gives_new_tries(hub: Hub, tmp_path: Path, fetcher: Fetcher) -> None:
    hub.faults = [Fault("data", 3 * TRIES, cut=1000)]
    file = remote(hub, tmp_path, sha256=SHA256)
    fetcher.fetch(file)
    assert is_clean(file) and len(hub.requests) == 3 * TRIES + 1


def test_it_gives_up_after_its_tries_and_keeps_what_came(
    hub: Hub, tmp_path: Path, fetcher: Fetcher, waits: list[float]
) -> None:
    hub.faults = [Fault("data", cut=700_000), Fault("data", 99, status=503)]
    file = remote(hub, tmp_path, sha256=SHA256)
    with pytest.raises(
        DataError, match=r"data.bin: HTTP status 503 \(tried again.*\); run the same"
    ):
        fetcher.fetch(file)
    assert len(hub.requests) == TRIES
    assert not file.path.exists() and file.record() is None
    assert beside(file.path, "part").stat().st_size == 700_000
    assert all(0.5 <= wait / 2**n <= 1.0 for n, wait in enumerate(waits))
    hub.faults = []
    fetcher.fetch(file)
    assert is_clean(file) and hub.requests[-1].range == "bytes=700000-"


def test_retry_after_is_obeyed(
    hub: Hub, tmp_path: Path, fetcher: Fetcher, waits: list[float]
) -> None:
    hub.faults = [Fault("data", status=429, retry_after="7")]
    fetcher.fetch(remote(hub, tmp_path))
    assert len(waits) == 1 and 7 < waits[0] <= 8
    hub.faults = [Fault("data", status=429, retry_after="4000")]
    other = RemoteFile(f"{hub.url}/files/data.bin", tmp_path / "other")
    with pytest.raises(DataError, match="the server asks to wait 4,000 s"):
        fetcher.fetch(other)
    assert len(waits) == 1


def test_retry_after_may_be_a_date() -> None:
    assert retry_after("120") == 120
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after("soon") is None and retry_after(None) is None


@pytest.mark.parametrize("known", [{"sha256": "0" * 64}, {"size": 5, "sha256": SHA256}])
def test_a_wrong_file_is_never_visible(
    hub: Hub, tmp_path: Path, fetcher: Fetcher, known: dict[str, Any]
) -> None:
    file = remote(hub, tmp_path, **known)
    with pytest.raises(DataError):
        fetcher.fetch(file)
    assert not file.path.exists() and file.record() is None


def test_a_wrong_hash_says_both(hub: Hub, tmp_path: Path, fetcher: Fetcher) -> None:
    with pytest.raises(DataError, match=f"{SHA256[:16]}..., not 000.*check the address and"):
        fetcher.fetch(remote(hub, tmp_path, sha256="0" * 64))


@pytest.mark.parametrize(("status", "line"), [(404, "not found"), (403, "forbidden")])
def test_a_refusal_is_said_at_once(
    hub: Hub, tmp_path: Path, fetcher: Fetcher, status: int, line: str
) -> None:
    hub.faults = [Fault("data", status=status)]
    with pytest.raises(DataError, match=line):
        fetcher.fetch(remote(hub, tmp_path))
    assert len(hub.requests) == 1


def test_no_server_is_a_line(tmp_path: Path, fetcher: Fetcher) -> None:
    with pytest.raises(DataError, match=r"connection refused \(tried again"):
        fetcher.fetch(RemoteFile("http://127.0.0.1:9/x", tmp_path / "x"))


# --- redirects and secrets -----------------------------------------------------------------------


def test_a_token_stays_with_its_host(hub: Hub, tmp_path: Path, fetcher: Fetcher) -> None:
    with serving(tmp_path / "server") as other:
        hub.faults = [Fault("data", cut=400_000), Fault("data", redirect=other.url + "{path}")]
        file = remote(hub, tmp_path, sha256=SHA256)
        fetcher.fetch(file)
        assert is_clean(file)
        assert [r.token for r in hub.requests] == ["Bearer canary"] * 2
        assert [(r.token, r.range) for r in other.requests] == [(None, "bytes=400000-")]


def test_a_token_follows_on_the_same_host(hub: Hub, tmp_path: Path, fetcher: Fetcher) -> None:
    hub.faults = [Fault("old", redirect="/files/data.bin")]
    fetcher.fetch(RemoteFile(f"{hub.url}/files/old", tmp_path / "x"))
    assert [r.token for r in hub.requests] == ["Bearer canary"] * 2


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x"])
def test_a_redirect_leads_only_to_http(
    hub: Hub, tmp_path: Path, fetcher: Fetcher, target: str
) -> None:
    hub.faults = [Fault("data", redirect=target)]
    file = remote(hub, tmp_path)
    with pytest.raises(DataError, match="redirects to where dtt does not follow"):
        fetcher.fetch(file)
    assert not file.path.exists()


def test_a_redirect_does_not_leave_encryption() -> None:
    handler, headers = _Redirects(), {"Authorization": "x", "Range": "bytes=5-"}
    secure = urllib.request.Request("https://a/x", headers=headers)
    assert handler.redirect_request(secure, None, 302, "", {}, "http://a/y") is None
    other = handler.redirect_request(secure, None, 302, "", {}, "https://a:444/y")
    assert other is not None and dict(other.header_items()) == {"Range": "bytes=5-"}
    same = handler.redirect_request(secure, None, 308, "", {}, "https://a/y")
    assert same is not None and dict(same.header_items()) == headers


def test_secrets_of_an_address_are_not_shown(hub: Hub, tmp_path: Path, fetcher: Fetcher) -> None:
    file = RemoteFile(f"{hub.url}/files/data.bin?key=canary", tmp_path / "here" / "data.bin")
    fetcher.fetch(file)
    texts = [path.read_bytes() for path in file.path.parent.iterdir()]
    assert not any(b"canary" in text for text in texts)
    assert shown("https://u:p@host/a?b=c#d") == "https://host/a"


# --- processes -----------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from pathlib import Path
from dtt.data.remote.fetch import Fetcher
from dtt.data.remote.partial import RemoteFile
from dtt.data.remote.transfer import bring
rows = json.loads(sys.argv[1])
files = [RemoteFile(url, Path(path), sha256=digest) for url, path, digest in rows]
bring(files, Fetcher(), Path(sys.argv[2]), what="test")
"""


def start(files: list[RemoteFile], lock: Path, **environment: str) -> subprocess.Popen[str]:
    rows = json.dumps([[file.url, str(file.path), file.sha256] for file in files])
    command = [sys.executable, "-c", SCRIPT, rows, str(lock)]
    env = {**os.environ, **environment}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.processes
@pytest.mark.parametrize("point", ["fetch.block@hit=3", "fetch.recorded", "storage.rename@hit=2"])
def test_a_killed_download_goes_on(hub: Hub, tmp_path: Path, point: str) -> None:
    file = remote(hub, tmp_path, sha256=SHA256)
    points = {"DTT_FAILPOINTS": f"{point}:kill9", "DTT_ENABLE_FAILPOINTS": "1"}
    killed = start([file], tmp_path / "lock", **points)
    assert killed.wait(20) == -signal.SIGKILL
    assert not file.path.exists()
    here = beside(file.path, "part").stat().st_size
    before = len(hub.requests)
    assert start([file], tmp_path / "lock").wait(20) == 0
    assert is_clean(file)
    ranges = [request.range for request in hub.requests[before:]]
    assert ranges == ([] if here == len(DATA) else [f"bytes={here}-"])


@pytest.mark.processes
def test_two_processes_download_once(hub: Hub, tmp_path: Path) -> None:
    hub.speed = 1e6
    file = remote(hub, tmp_path, sha256=SHA256)
    both = [start([file], tmp_path / "lock") for _ in range(2)]
    said = "".join(process.communicate(timeout=20)[1] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert is_clean(file) and hub.sent("data") == len(DATA)
    assert "waiting for another download of test" in said


# --- many files ----------------------------------------------------------------------------------


def several(hub: Hub, tmp_path: Path, count: int) -> list[RemoteFile]:
    files = []
    for number in range(count):
        data = hub.add(f"files/{number}.bin", random.Random(number).randbytes(50_000))
        digest = hashlib.sha256(data).hexdigest()
        path = tmp_path / "here" / f"{number}.bin"
        files.append(RemoteFile(f"{hub.url}/files/{number}.bin", path, 50_000, digest))
    return files


def test_several_files_come_at_the_same_time(hub: Hub, tmp_path: Path, fetcher: Fetcher) -> None:
    files = several(hub, tmp_path, 9)
    hub.faults = [Fault("[0-9].bin", 4, status=500)]
    bring(files, fetcher, tmp_path / "lock", connections=3)
    assert all(file.record() for file in files)
    before = len(hub.requests)
    bring(files, fetcher, tmp_path / "lock")
    assert len(hub.requests) == before


def test_one_failure_ends_the_others_and_is_the_one_reported(
    hub: Hub, tmp_path: Path, fetcher: Fetcher
) -> None:
    files = several(hub, tmp_path, 8)
    hub.faults = [Fault("3.bin", 99, status=404)]
    hub.speed = 1e5
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"3\.bin: HTTP status 404"):
        bring(files, fetcher, tmp_path / "lock", connections=8)
    assert time.monotonic() - begun < 0.4  # the others would have taken 0.5 s
    for thread in threading.enumerate():
        if thread.name == "download":
            thread.join(5)
    hub.faults, hub.speed = [], float("inf")
    bring(files, Fetcher(), tmp_path / "lock")
    assert all(file.record() for file in files)


def test_a_size_that_the_server_said_gives_percent_and_time(
    hub: Hub, tmp_path: Path, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("dtt.data.remote.transfer.EVERY", 0.0)
    monkeypatch.setattr("dtt.data.remote.transfer.note", said.append)
    file = remote(hub, tmp_path, said=fetcher.size(f"{hub.url}/files/data.bin"))
    bring([file], fetcher, tmp_path / "lock", what="test")
    assert "of 1.0 MB (100%)" in said[-1] and said[-1].endswith(" left")
    assert fetcher.brought == len(DATA)


def test_a_size_is_had_without_head_and_a_missing_file_is_said(hub: Hub, fetcher: Fetcher) -> None:
    hub.faults = [Fault("data", method="HEAD", status=403)]
    assert fetcher.size(f"{hub.url}/files/data.bin") == len(DATA)
    with pytest.raises(DataError, match="nope: HTTP status 404"):
        fetcher.size(f"{hub.url}/files/nope")


def test_the_meter_says_how_long_it_takes() -> None:
    now = 0.0
    meter = Meter(10_000_000, lambda: now)
    for second in range(1, 5):
        now = float(second)
        meter.add(1_000_000)
    assert meter.line() == "4.0 MB of 10.0 MB (40%), 1.0 MB/s, 6.0 s left"
    now = 20.0
    meter.add(0)
    assert meter.speed() < 0.3e6  # it has stalled: the last seconds count
    assert [size_text(n) for n in (0, 999, 2.15e9)] == ["0 bytes", "999 bytes", "2.1 GB"]
    assert [time_text(s) for s in (5, 300, 7500)] == ["5.0 s", "5 min", "2 h 05 min"]
