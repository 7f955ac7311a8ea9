"""A Hub with three data sets, which the client libraries take for the real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_server import Hub as Server
from hub_server import serving

CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
- config_name: two
  data_files:
  - split: train
    path: [data/b.jsonl, sample/**/0.jsonl]
  - split: test
    path: extra/t.jsonl
---
# A data set
"""


def rows(*texts: str) -> bytes:
    return "".join(json.dumps({"title": t[:1], "text": t}) + "\n" for t in texts).encode()


@contextmanager
def small_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serve the data sets while inside; no try is waited for."""
    import datasets
    import huggingface_hub

    with serving(tmp_path / "server") as hub:
        web, mono, plain = (f"datasets/org/{name}/" for name in ("web", "mono", "plain"))
        hub.add(f"{web}README.md", CARD.encode())
        hub.add(f"{web}data/a.jsonl", rows("aa", "ab"))
        hub.add(f"{web}data/b.jsonl", rows("ba" * 2000, "bb"))
        hub.add(f"{web}sample/10BT/0.jsonl", rows("sa", "sb"))
        hub.add(f"{web}sample/10BT/1.jsonl", rows("sc", "sd"))
        hub.add(f"{web}extra/t.jsonl", rows("ta"))
        hub.add(f"{mono}train.txt", b"one\n\ntwo\n\nthree")
        hub.add(f"{mono}test.txt", b"four")
        hub.add(f"{plain}corpus/x.txt", b"x" * 3000)
        hub.add(f"{plain}corpus/y.txt", b"y" * 10)
        hub.add(f"{plain}notes.md", b"n")
        for place, name, value in (
            (huggingface_hub.constants, "ENDPOINT", hub.url),
            (
                huggingface_hub.constants,
                "HUGGINGFACE_CO_URL_TEMPLATE",
                hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            ),
            (huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache")),
            (huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token")),
            # Read from the environment when they are imported, which another test may have been.
            (huggingface_hub.constants, "HF_HUB_OFFLINE", False),
            (datasets.config, "HF_HUB_OFFLINE", False),
            (datasets.config, "HF_ENDPOINT", hub.url),
            (datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache"),
        ):
            monkeypatch.setattr(place, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        short = type("Short", (), {"uniform": lambda a, b: 1e-3})
        monkeypatch.setattr("dtt.data.remote.retries.random", short)
        huggingface_hub.HfFileSystem.clear_instance_cache()
        yield hub
