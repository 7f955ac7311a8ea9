"""Durable files, the run lock and failpoints: each against what the operating system then holds."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtt import storage
from dtt.errors import BusyError, ConfigError, StorageError


@pytest.fixture
def failpoints(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    def activate(text: str) -> None:
        monkeypatch.setenv("DTT_FAILPOINTS", text)
        monkeypatch.setenv("DTT_ENABLE_FAILPOINTS", "1")
        storage.active_failpoints.cache_clear()

    yield activate
    monkeypatch.undo()
    storage.active_failpoints.cache_clear()


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "DTT_ENABLE_FAILPOINTS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_needs_no_torch() -> None:
    child = python("import sys, dtt.storage; print('torch' in sys.modules)")
    assert child.communicate()[0] == "False\n"


@pytest.mark.parametrize("size", [0, 1, storage.BLOCK, storage.BLOCK + 1])
def test_stream_is_hashed_as_written(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    written = storage.write_stream(tmp_path / "f", [data[:3], memoryview(data)[3:]])
    assert (tmp_path / "f").read_bytes() == data
    assert written == (size, hashlib.sha256(data).hexdigest())
    assert storage.file_digest(tmp_path / "f") == written.digest


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    storage.write_atomic(tmp_path / "f", b"old" * 100)
    storage.write_atomic(tmp_path / "f", "né")
    assert (tmp_path / "f").read_bytes() == b"n\xc3\xa9"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_atomic_write_killed_anywhere_leaves_old_or_new(tmp_path: Path) -> None:
    target = tmp_path / "f"
    seen = set()
    for hit in range(1, 50):
        target.write_bytes(b"old")
        code = "import sys; from dtt.storage import *; write_atomic(Path(sys.argv[1]), b'new')"
        child = subprocess.run(
            [sys.executable, "-c", code, str(target)],
            env={
                **os.environ,
                "DTT_ENABLE_FAILPOINTS": "1",
                "DTT_FAILPOINTS": f"storage.*@hit={hit}:kill9",
            },
            capture_output=True,
            check=False,
        )
        seen.add(target.read_bytes())
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
    assert seen == {b"old", b"new"}
    assert hit == 7  # open, write, fsync, written, rename, sync_folder; then undisturbed


@pytest.mark.parametrize(("action", "number"), [("enospc", errno.ENOSPC), ("raise=EIO", errno.EIO)])
@pytest.mark.parametrize("where", ["open", "write", "fsync", "rename"])
def test_failed_write_keeps_the_old_file(
    tmp_path: Path, failpoints: object, where: str, action: str, number: int
) -> None:
    (tmp_path / "f").write_bytes(b"old")
    failpoints(f"storage.{where}:{action}")  # type: ignore[operator]
    with pytest.raises(StorageError) as caught:
        storage.write_atomic(tmp_path / "f", b"new")
    assert "/f" in caught.value.what or "/.f" in caught.value.what
    assert os.strerror(number) in caught.value.what and caught.value.fix
    assert storage.worth_retrying(caught.value) is (number == errno.EIO)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"f": b"old"}


def test_file_that_shrinks_before_its_sync_is_an_error(tmp_path: Path, failpoints: object) -> None:
    failpoints("storage.fsync@file=f:truncate=2")  # type: ignore[operator]
    with pytest.raises(StorageError, match="Input/output"):
        storage.write_stream(tmp_path / "f", [b"12345"])


def test_errors_name_path_reason_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for action in (
        lambda: storage.make_folder(tmp_path / "file"),
        lambda: storage.make_folder(tmp_path / "file" / "below"),
        lambda: storage.write_atomic(tmp_path / "absent" / "f", b""),
        lambda: storage.file_digest(tmp_path / "absent"),
        lambda: storage.write_stream(tmp_path / "file", [b""]),
    ):
        with pytest.raises(StorageError) as caught:
            action()
        assert str(tmp_path) in caught.value.what and caught.value.fix
        assert caught.value.exit_code == 5 and "\n" not in str(caught.value)


def test_remove_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "f").write_text("x")
    (tmp_path / "gone" / "deep").mkdir(parents=True)
    (tmp_path / "gone" / "deep" / "link").symlink_to(tmp_path / "kept")
    storage.remove(tmp_path / "gone")
    assert not (tmp_path / "gone").exists() and (tmp_path / "kept" / "f").exists()


HOLD = """
import time, pathlib, os
from dtt.storage import RunLock
with RunLock(pathlib.Path(os.environ["RUN"])):
    worker = os.environ.get("WORKER") and os.fork() == 0
    if worker or not os.environ.get("WORKER"):
        print("held", flush=True)
    time.sleep(3 if worker else 60)
    os._exit(0)
"""


def test_lock_of_another_process_is_refused_at_once_and_ends_with_it(tmp_path: Path) -> None:
    holder = python(HOLD, RUN=str(tmp_path / "run"))
    assert holder.stdout is not None
    assert holder.stdout.readline().startswith("held")
    start = time.monotonic()
    with pytest.raises(BusyError) as caught, storage.RunLock(tmp_path / "run"):
        pass
    assert time.monotonic() - start < 2
    assert caught.value.exit_code == 8
    assert f"process {holder.pid} on " in str(caught.value) and "\n" not in str(caught.value)
    holder.kill()
    holder.communicate()
    with storage.RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()


def test_worker_that_outlives_the_holder_does_not_hold_the_lock(tmp_path: Path) -> None:
    holder = python(HOLD, RUN=str(tmp_path), WORKER="1")
    assert holder.stdout is not None
    holder.stdout.readline()
    holder.kill()
    holder.wait()
    with storage.RunLock(tmp_path):
        pass
    holder.stdout.close()
    assert holder.stderr is not None
    holder.stderr.close()


def test_lock_is_released_and_a_broken_lock_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(b"\xff garbage")
    with storage.RunLock(tmp_path), pytest.raises(BusyError), storage.RunLock(tmp_path):
        pass
    with storage.RunLock(tmp_path):
        pass


def test_failpoint_conditions(failpoints: object, tmp_path: Path) -> None:
    failpoints("a.b@step=3,rank=1,hit=2:raise=KeyError; a.*@file=x:raise=EIO")  # type: ignore[operator]
    storage.failpoint("a.b", step=3, rank=0)
    storage.failpoint("a.b", step=3, rank=1)
    storage.failpoint("other", step=3, rank=1)
    with pytest.raises(KeyError):
        storage.failpoint("a.b", step=3, rank=1)
    storage.failpoint("a.b", step=3, rank=1)
    with pytest.raises(OSError, match="Input/output"):
        storage.failpoint("a.c", file=tmp_path / "x")


def test_failpoints_need_to_be_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTT_FAILPOINTS", "*:kill9")
    monkeypatch.delenv("DTT_ENABLE_FAILPOINTS", raising=False)
    storage.active_failpoints.cache_clear()
    storage.failpoint("anything")
    monkeypatch.undo()
    storage.active_failpoints.cache_clear()


@pytest.mark.parametrize(
    "text", ["a", "a:fly", "a:exit=x", "a@k:kill9", "a:raise=Nothing", "a:sleep"]
)
def test_wrong_failpoint_is_an_error(failpoints: object, text: str) -> None:
    failpoints(text)  # type: ignore[operator]
    with pytest.raises(ConfigError, match="not a failpoint"):
        storage.failpoint("a")


def test_process_actions() -> None:
    point = "from dtt.storage import failpoint; failpoint('p'); print('past')"
    child = python(point, DTT_FAILPOINTS="p:exit=9")
    assert (child.communicate()[0], child.returncode) == ("", 9)
    child = python(point, DTT_FAILPOINTS="p:stop")
    assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
    os.kill(child.pid, signal.SIGCONT)
    assert child.communicate()[0] == "past\n"
    start = time.monotonic()
    assert python(point, DTT_FAILPOINTS="p:sleep=0.3").communicate()[0] == "past\n"
    assert time.monotonic() - start > 0.3
