"""A Hub with models, which `huggingface_hub` takes for the real one: to download and to upload."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hub_server import Fault, Handler, Hub, Server, entry, tree

LARGE = (".safetensors",)
TOKEN = "hf_of_the_test"


class ModelHandler(Handler):
    """Models lie in ROOT/models/ORG/NAME; only TOKEN may upload."""

    def do_PUT(self) -> None:  # noqa: N802
        self.do_POST()

    def _route(self, path: str, fault: Fault | None) -> None:
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if self.command in ("POST", "PUT"):
            self._upload(path)
            return
        match = api or resolve
        if match is None:
            self._missing("EntryNotFound")
            return
        folder = self.hub.root / "models" / match[1]
        if not folder.is_dir():
            self._missing("RepoNotFound", 401)
            return
        commit = self.hub.commit(folder)
        revision = (api[3] if api else match[2]) or "main"
        if revision not in ("main", commit):
            self._missing("RevisionNotFound")
        elif api and api[2] == "tree":
            self._json([entry(folder, name) for name in tree(folder)])
        elif api:
            siblings = [{"rfilename": name} for name in tree(folder)]
            about = {"id": match[1], "sha": commit, "siblings": siblings, "tags": []}
            self._json(about | {"private": False, "disabled": False, "gated": False})
        else:
            self._resolve(match[1], folder / match[3], commit, fault)

    def _upload(self, path: str) -> None:
        if self.entry.token != f"Bearer {TOKEN}" and not path.startswith("/lfs/"):
            self._reply(401, b'{"error": "Invalid username or password."}', {})
        elif path == "/api/repos/create":
            asked = json.loads(self.body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            (self.hub.root / "models" / name).mkdir(parents=True, exist_ok=True)
            self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": "0"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.startswith("/lfs/"):
            self.hub.add(f"stored/{path.removeprefix('/lfs/')}", self.body)
            self._json({})
        elif path.endswith("/info/lfs/objects/batch"):
            rows = json.loads(self.body)["objects"]
            self._json({"transfer": "basic", "objects": [self._place(row) for row in rows]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            rows = json.loads(self.body)["files"]
            self._json({"files": [self._mode(row["path"]) for row in rows]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(match[1])
        else:
            self._missing("EntryNotFound")

    def _place(self, row: dict[str, Any]) -> dict[str, Any]:
        upload = {"upload": {"href": f"{self.hub.url}/lfs/{row['oid']}"}}
        return {"oid": row["oid"], "size": row["size"], "actions": upload}

    def _mode(self, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(LARGE) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _commit(self, name: str) -> None:
        for line in self.body.splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "file":
                data = base64.b64decode(value["content"])
                self.hub.add(f"models/{name}/{value['path']}", data)
            elif row["key"] == "lfsFile":
                data = (self.hub.root / "stored" / value["oid"]).read_bytes()
                self.hub.add(f"models/{name}/{value['path']}", data)
        commit = self.hub.commit(self.hub.root / "models" / name)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url})


@contextmanager
def model_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve the models of tmp_path/server while inside; no try is waited for."""
    import huggingface_hub

    hub = Hub(tmp_path / "server")
    server = Server(("127.0.0.1", 0), type("Bound", (ModelHandler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    constants = huggingface_hub.constants
    for name, value in (
        ("ENDPOINT", hub.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_CACHE", str(tmp_path / "cache")),
        ("HF_TOKEN_PATH", str(tmp_path / "token")),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),  # a store that the stand-in does not have
    ):
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    short = type("Short", (), {"uniform": lambda a, b: 1e-3})
    monkeypatch.setattr("dtt.data.remote.retries.random", short)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
