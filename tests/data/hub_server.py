"""A server that speaks the Hub's interface for data sets, with faults on demand.

Below its root are datasets/ORG/NAME/<files of the repository> and files/<plain files>. Large files
count as LFS files (they have a SHA-256), small ones as git's (they have a blob hash). Also a script
of its own, for benchmarks: `python hub_server.py ROOT` prints the address and serves until killed.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LFS_FROM = 2000
"""Bytes from which on a file is not in git itself."""


@dataclass
class Fault:
    """Something goes wrong with the next `times` requests whose path `match` finds."""

    match: str
    times: int = 1
    method: str = "GET"
    status: int = 0
    retry_after: str = ""
    cut: int = -1
    """Bytes of the body after which the connection ends."""
    stall: float = 0.0
    """Seconds of silence after `cut` bytes."""
    drop: bool = False
    """End the connection instead of an answer."""
    no_range: bool = False
    """Send the whole file whatever was asked for."""
    chunked: bool = False
    """Do not say how long the body is."""
    flip: bool = False
    """Another byte in the middle."""
    redirect: str = ""
    """Where to send the client instead: {path} stands for the path."""


@dataclass
class Request:
    """What came, and how much went."""

    method: str
    path: str
    range: str | None
    token: str | None
    status: int = 0
    sent: int = 0


@dataclass
class Hub:
    """A running server."""

    root: Path
    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    gated: dict[str, str] = field(default_factory=dict)
    """Data sets whose files only this token opens."""
    speed: float = float("inf")
    """Bytes per second of each connection."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for one in self.faults:
                if one.times and one.method == method and re.search(one.match, path):
                    one.times -= 1
                    return one
        return None

    def sent(self, match: str) -> int:
        """Bytes of bodies that went out for paths that `match` finds."""
        return sum(r.sent for r in self.requests if r.method == "GET" and re.search(match, r.path))

    def add(self, path: str, data: bytes) -> bytes:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return data

    def commit(self, folder: Path) -> str:
        """A commit hash that changes with any file."""
        names = [f"{path}{digest(folder / path)[0]}" for path in tree(folder)]
        return hashlib.sha1("".join(names).encode()).hexdigest()


def tree(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def digest(path: Path) -> tuple[str, str]:
    """SHA-256 and git's blob hash of a file."""
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


@cache
def _digest(path: Path, size: int, changed: int) -> tuple[str, str]:
    whole, blob = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            whole.update(block)
            blob.update(block)
    return whole.hexdigest(), blob.hexdigest()


def entry(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    sha256, blob = digest(path)
    size = path.stat().st_size
    row: dict[str, Any] = {"type": "file", "oid": blob, "size": size, "path": name}
    if size >= LFS_FROM:
        row["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
    return row


class Handler(BaseHTTPRequestHandler):
    """Answers one connection; `server.hub` is the state."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.do_GET()

    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(parts.path)
        self.query = urllib.parse.parse_qs(parts.query)
        token = self.headers.get("Authorization")
        self.entry = Request(self.command, path, self.headers.get("Range"), token)
        self.hub.requests.append(self.entry)
        fault = self.hub.fault(self.command, path)
        if fault and fault.drop:
            self._end()
        elif fault and fault.redirect:
            self._reply(302, b"", {"Location": fault.redirect.format(path=path)})
        elif fault and fault.status:
            extra = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            self._reply(fault.status, b"injected", extra)
        else:
            self._route(path, fault)

    def _route(self, path: str, fault: Fault | None) -> None:
        api = re.match(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+))?", path)
        resolve = re.match(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if path.startswith("/files/"):
            self._send_file(self.hub.root / path[1:], fault)
        elif api or resolve:
            match = api or resolve
            assert match is not None
            folder = self.hub.root / "datasets" / match[1]
            if not folder.is_dir():
                self._missing("RepoNotFound", 401)
                return
            commit = self.hub.commit(folder)
            revision = (api[3] if api else resolve[2] if resolve else None) or "main"
            if revision not in ("main", commit):
                self._missing("RevisionNotFound")
            elif api:
                self._api(api[1], api[2], folder, commit, path[api.end() :].strip("/"))
            elif resolve:
                self._resolve(match[1], folder / resolve[3], commit, fault)
        else:
            self._missing("EntryNotFound")

    def _api(self, name: str, what: str | None, folder: Path, commit: str, inner: str) -> None:
        if what in (None, "revision"):
            gated = "auto" if name in self.hub.gated else False
            siblings = [{"rfilename": file} for file in tree(folder)]
            info = {"id": name, "sha": commit, "gated": gated, "siblings": siblings}
            self._json(info | {"private": False, "disabled": False, "tags": []})
        elif what == "paths-info":
            paths = urllib.parse.parse_qs(self.body.decode())["paths"]
            self._json([entry(folder, path) for path in paths if (folder / path).exists()])
        elif not (folder / inner).is_dir():
            self._missing("EntryNotFound")
        else:
            deep = self.query.get("recursive", ["false"])[0].lower() in ("1", "true")
            found = (folder / inner).rglob("*") if deep else (folder / inner).glob("*")
            names = sorted(path.relative_to(folder).as_posix() for path in found)
            self._json([entry(folder, name) for name in names])

    def _resolve(self, name: str, path: Path, commit: str, fault: Fault | None) -> None:
        wanted = self.hub.gated.get(name)
        if wanted is not None and self.entry.token != f"Bearer {wanted}":
            self._missing("GatedRepo", 403 if self.entry.token else 401)
        elif not path.is_file():
            self._missing("EntryNotFound")
        else:
            etag = digest(path)[path.stat().st_size < LFS_FROM]
            extra = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{etag}"'}
            self._send_file(path, fault, extra | {"X-Linked-Size": str(path.stat().st_size)})

    def _send_file(
        self, path: Path, fault: Fault | None, extra: dict[str, str] | None = None
    ) -> None:
        if not path.is_file():
            self._missing("EntryNotFound")
            return
        fault = fault or Fault("")
        data, size, etag = path.read_bytes(), path.stat().st_size, f'"{digest(path)[0][:32]}"'
        if fault.flip:
            data = data[: size // 2] + bytes([data[size // 2] ^ 1]) + data[size // 2 + 1 :]
        start, stop, status = 0, size, 200
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if asked and not fault.no_range and self.headers.get("If-Range", etag) == etag:
            start = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
            stop = min(size, int(asked[2]) + 1) if asked[1] and asked[2] else size
            status = 206
            if start >= size:
                self._reply(416, b"", {"Content-Range": f"bytes */{size}"})
                return
        self.entry.status = status
        self.send_response(status)
        headers = {"ETag": etag, "Accept-Ranges": "bytes"} | (extra or {})
        if fault.chunked:
            headers["Connection"] = "close"
        else:
            headers["Content-Length"] = str(stop - start)
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self._send_body(memoryview(data)[start:stop], fault)

    def _send_body(self, body: memoryview, fault: Fault) -> None:
        cut = len(body) if fault.cut < 0 else min(fault.cut, len(body))
        step = 1 << 20 if self.hub.speed == float("inf") else 1 << 14
        for begin in range(0, cut, step):
            block = body[begin : min(begin + step, cut)]
            try:
                self.wfile.write(block)
            except OSError:
                self.close_connection = True
                return
            self.entry.sent += len(block)
            time.sleep(len(block) / self.hub.speed)
        time.sleep(fault.stall)
        if cut < len(body) or fault.chunked:
            self._end()

    def _end(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    def _missing(self, code: str, status: int = 404) -> None:
        self._reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, value: Any) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _reply(self, status: int, body: bytes, extra: dict[str, str]) -> None:
        self.entry.status = status
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for key, value in extra.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        """A client that has gone is what tests are about."""


def start(root: Path) -> tuple[Hub, Server]:
    hub = Hub(root)
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return hub, server


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """A server on a port of its own while inside."""
    hub, server = start(root)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    print(start(Path(sys.argv[1]))[0].url, flush=True)
    threading.Event().wait()
