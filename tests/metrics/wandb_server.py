"""A small W&B server for tests: takes runs, keeps what clients send, answers as the real one does.

And a reader of the files that offline runs leave: a header of seven bytes, then blocks of 32 KiB of
records (CRC, length, kind, protobuf), as LevelDB's log has them.
"""

from __future__ import annotations

import gzip
import json
import re
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7


class WandbServer:
    """Serves on a free port of this machine between `with` and its end."""

    def __init__(self) -> None:
        self.history: dict[str, list[dict[str, Any]]] = {}
        """Rows of figures by run."""
        self.configs: dict[str, str] = {}
        self.asked: list[str] = []
        self.dies = False
        """Whether it is gone as soon as a client sends figures."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._answer({})

            def do_PUT(self) -> None:
                self._body()
                self._answer({})

            def do_POST(self) -> None:
                given = json.loads(self._body() or b"{}")
                if self.path.endswith("/file_stream"):
                    if server.dies:
                        server._server.shutdown()
                        server._server.server_close()
                        self.close_connection = True
                        return
                    server._keep(self.path.split("/")[-2], given)
                    self._answer({"exitcode": None, "limits": {}})
                elif self.path == "/graphql":
                    asked = server._graphql(given.get("query", ""), given.get("variables") or {})
                    self._answer({"data": asked})
                else:
                    self._answer({})

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                zipped = self.headers.get("Content-Encoding") == "gzip"
                return gzip.decompress(body) if zipped else body

            def _answer(self, content: Any) -> None:
                body = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _keep(self, run: str, sent: dict[str, Any]) -> None:
        lines = sent.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.history.setdefault(run, []).extend(json.loads(line) for line in lines)

    def _graphql(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        name = re.search(r"(?:query|mutation)\s+(\w+)", query)
        self.asked.append(name[1] if name else query[:40])
        project = {"id": "P", "name": "dtt", "entity": {"id": "E", "name": "me"}}
        if "upsertBucket" in query:
            run = given.get("name") or given.get("id") or "none"
            known = run in self.configs
            self.configs[run] = given.get("config") or self.configs.get(run, "{}")
            bucket = {"id": f"bucket-{run}", "name": run, "displayName": run, "description": ""}
            bucket |= {"config": "{}", "sweepName": None, "project": project}
            bucket |= {"historyLineCount": len(self.history.get(run, []))}
            return {"upsertBucket": {"bucket": bucket, "inserted": not known}}
        if "createRunFiles" in query:
            files = [
                {"name": f, "uploadUrl": f"{self.address}/up/{f}"} for f in given.get("files", [])
            ]
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
        if "createArtifact(" in query:  # it has the content already
            sequence = {"id": "S", "latestArtifact": {"id": "A"}}
            artifact = {"id": "A", "state": "COMMITTED", "artifactSequence": sequence}
            return {"createArtifact": {"artifact": artifact}}
        versions = {"max_cli_version": "9.9.9"}
        info = {"cliVersionInfo": versions, "latestLocalVersionInfo": None, "features": []}
        if "viewer" in query:
            viewer = {"id": "V", "username": "me", "entity": "me", "email": "", "flags": "{}"}
            return {"viewer": viewer | {"admin": False, "teams": {"edges": []}}, "serverInfo": info}
        if "RunResumeStatus" in query and given.get("name") in self.configs:
            return {"model": {"id": "P", "name": "dtt", "bucket": self._resumed(given["name"])}}
        if "serverInfo" in query:
            return {"serverInfo": info}
        found: dict[str, Any] = dict.fromkeys(re.findall(r"(\w+)\s*:\s*__type", query))
        return found | {"model": None, "project": None, "__type": None}

    def _resumed(self, run: str) -> dict[str, Any]:
        rows = self.history.get(run, [])
        tail = [json.dumps(row) for row in rows[-1:]]
        bucket = {"id": f"bucket-{run}", "name": run, "summaryMetrics": "{}", "displayName": run}
        bucket |= {"logLineCount": 0, "historyLineCount": len(rows), "eventsLineCount": 0}
        bucket |= {"historyTail": json.dumps(tail), "eventsTail": "[]", "config": "{}", "tags": []}
        return bucket | {"wandbConfig": json.dumps({"t": {"1": []}}), "stopped": False}


def records(path: Path) -> Iterator[Any]:
    """Yield the records of an offline run's file; a torn end is left out."""
    from wandb.proto import wandb_internal_pb2

    content, place, pieces = path.read_bytes(), HEADER, b""
    assert content[:4] == b":W&B"
    while place + HEADER <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEADER:  # too little for another record
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + HEADER])
        piece = content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if len(piece) < length or not kind:
            return
        pieces = piece if kind in (1, 2) else pieces + piece
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            yield record


def history(path: Path) -> list[dict[str, Any]]:
    """Return the rows of figures of an offline run's file."""
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json)
         for item in record.history.item}
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]  # fmt: skip
