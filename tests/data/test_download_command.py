"""`dtt download`: a plan, what is missing, and nothing twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub as Server
from small_hub import small_hub

from dtt.cli import main
from dtt.data.remote.fetch import Fetcher
from dtt.data.remote.hub import Selection
from dtt.errors import StorageError


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with small_hub(tmp_path, monkeypatch) as hub:
        yield hub


Dtt = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dtt(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Dtt:

    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        code = main(list(words))
        return code, *capsys.readouterr()

    return run


def test_the_plan_comes_first_and_a_dry_run_is_only_that(dtt: Dtt, server: Server) -> None:
    code, out, _ = dtt("download", "-d", "org/web", "--dry-run")
    first, second = out.splitlines()
    assert code == 0 and first.startswith("org/web (train) at ")
    assert first.endswith(": 2 files, 4.1 kB")
    assert "4.1 kB into data/downloads/hub/org--web, where " in second
    assert server.sent("jsonl") == 0
    code, out, _ = dtt("download", "-d", "org/web", "--max-bytes", "1k".upper())
    assert code == 0 and "1 file, " in out and "came in" in out
    code, out, _ = dtt("download", "-d", "org/web")
    assert "here already: 1 file\n" in out
    before = len(server.requests)
    code, out, _ = dtt("download", "-d", "org/web")
    assert code == 0 and "all here, in data/downloads/hub/org--web" in out
    assert len(server.requests) == before


def test_a_disk_too_small_is_said_before_anything_comes(
    dtt: Dtt, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    code, _, err = dtt("download", "-d", "org/web")
    assert code == StorageError.exit_code
    assert "needs 4.1 kB, and data/downloads/hub/org--web has 1.0 kB free" in err
    assert server.sent("jsonl") == 0


def test_verify_brings_what_is_damaged_again(dtt: Dtt, server: Server) -> None:
    assert dtt("download", "-d", "org/mono")[0] == 0
    path = next(Path("data").rglob("train.txt"))
    path.write_bytes(b"ONE" + path.read_bytes()[3:])
    assert "all here" in dtt("download", "-d", "org/mono")[1]
    code, out, err = dtt("download", "-d", "org/mono", "--verify")
    assert code == 0 and "damaged since it was downloaded" in err and "came in" in out
    assert path.read_bytes() == b"one\n\ntwo\n\nthree"


def test_a_url_and_a_text_file_of_a_remote_corpus(dtt: Dtt, server: Server) -> None:
    server.add("files/book.txt", b"a book")
    code, out, _ = dtt("download", "-d", f"{server.url}/files/book.txt")
    assert code == 0 and "/files/book.txt: 1 file, 6 bytes" in out
    code, out, _ = dtt("download", "-d", "org/mono", "-o", "mono.txt")
    assert code == 0 and Path("mono.txt").read_bytes().startswith(b"one\n\ntwo")


def test_a_name_that_is_nowhere_is_one_line(dtt: Dtt, server: Server) -> None:
    code, _, err = dtt("download", "-d", "org/none")
    assert code == 3 and err.count("\n") == 1 and "no data set org/none" in err
    code, _, err = dtt("download", "-d", "books/none.txt")
    assert code == 3 and "books/none.txt: no such file" in err


def test_the_plan_of_the_first_documents_is_a_limit(dtt: Dtt, server: Server) -> None:
    many = ("download", "-d", "org/web", "--data.source.config", "sample-10BT")
    _, out, _ = dtt(*many, "--max-documents", "2")
    plan, into, came, here = out.splitlines()
    assert plan.endswith(": the first 2 documents of 2 files, 116 bytes")
    assert into.startswith("  at most 116 bytes into ") and came.startswith("  58 bytes came in ")
    assert here == "  the first 2 documents are here"
    for count in "2", "1":
        _, out, _ = dtt(*many, "--max-documents", count)
        assert "all here, in data/" in out and " into " not in out
    _, out, _ = dtt(*many, "--max-documents", "9")
    assert out.endswith("  4 of the first 9 documents are here: there are no more\n")


def test_what_another_process_brought_is_not_claimed(
    dtt: Dtt, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtt.data.remote.reader import download

    def after_another(settings: Any, selection: Selection) -> None:
        download(settings, replace(selection, fetcher=Fetcher()))
        download(settings, selection)

    monkeypatch.setattr("dtt.data.remote.download.download", after_another)
    _, out, _ = dtt("download", "-d", "org/mono")
    assert out.endswith("  another process brought it\n") and "came in" not in out


def test_a_missing_url_has_no_plan(dtt: Dtt, server: Server) -> None:
    code, out, err = dtt("download", "-d", f"{server.url}/files/nope.jsonl")
    assert (code, out) == (3, "") and "nope.jsonl: HTTP status 404 not found; check" in err


def test_texts_have_the_names_of_their_corpora_and_overwrite_none(dtt: Dtt) -> None:
    for name in "one", "two":
        Path(f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
        assert dtt("download", "-d", f"{name}.jsonl")[0] == 0
    assert [Path(f"data/{name}.txt").read_text()[:3] for name in ("one", "two")] == ["one", "two"]
    before = Path("data/one.txt").read_bytes()
    code, _, err = dtt("download", "-d", "data/one.txt")
    assert code == 2 and "data/one.txt is a file of the corpus itself" in err
    assert Path("data/one.txt").read_bytes() == before


@pytest.mark.processes
def test_sigterm_ends_a_download_that_can_go_on(server: Server, tmp_path: Path) -> None:
    data = server.add("files/big.txt", b"words " * 200_000)
    server.speed = 1e6
    command = [sys.executable, "-m", "dtt", "download", "-d", f"{server.url}/files/big.txt"]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for _ in range(1000):
        if server.sent("big") > 300_000:
            break
        threading.Event().wait(0.01)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=10)
    assert running.returncode == 75 and "the same command goes on where it is" in err
    server.speed = float("inf")
    before = server.sent("big")
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "here already: 0 files and " in again.stdout
    assert server.sent("big") - before < len(data) - 250_000


def test_a_mixture_of_what_is_here_has_nothing_to_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.yaml").write_text("data: {mixture: [{name: a, source: {name: tales}}]}\n")
    assert main(["download", "-c", "m.yaml"]) == 0
    assert "all parts of the mixture are on this machine" in capsys.readouterr().out
    assert not Path("data").exists() or not list(Path("data").glob("*.txt"))
    assert main(["download", "-c", "m.yaml", "--output", "all.txt"]) == 2
    assert "this is a mixture; name one with -d" in capsys.readouterr().err


def test_one_document_is_written_as_it_is(dtt: Dtt, tmp_path: Path) -> None:
    text = "first\n\n\nsecond\n"
    (tmp_path / "one.txt").write_text(text)
    code, out, _ = dtt("download", "--data-path", str(tmp_path / "one.txt"), "--output", "copy.txt")
    assert code == 0 and Path("copy.txt").read_text() == text
    assert "copy.txt: 1 document," in out and "separator" not in out
    (tmp_path / "two.txt").write_text("more")
    paths = [str(tmp_path / "one.txt"), str(tmp_path / "two.txt")]
    code, out, _ = dtt("download", "--data-path", *paths, "--output", "both.txt")
    assert code == 0 and Path("both.txt").read_text() == f"{text}\n<|endoftext|>\nmore"
    assert r"--data.source.separator '\n<|endoftext|>\n'" in out
