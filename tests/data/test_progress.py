"""What is said of how far a long preparation is."""

from __future__ import annotations

import io
import re
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from dtt.config.data import Byte, Data
from dtt.config.sources import Tales
from dtt.data import progress
from dtt.data.preparation import board
from dtt.data.preparation.prepare import prepare


def test_parts_speed_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def encoded(self: object, part: object) -> int:
        clock[0] += 10  # seconds for each part
        return original(self, part)

    original = board.PartEncoder.__call__
    monkeypatch.setattr(board.PartEncoder, "__call__", encoded)
    monkeypatch.setattr(board.time, "monotonic", lambda: clock[0])
    said: list[tuple[str, int, int, str]] = []
    data = Data(source=Tales(stories=10_000), dir=tmp_path, workers=1)
    made = prepare(data, Byte(), advance=lambda *news: said.append((*news, "")[:4]))
    sizes = sum(made.manifest.total(split, "bytes") for split in ("train", "val"))
    counted = [news for news in said if news[0] == "encoding"]
    assert [news[1:3] for news in counted] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    speed = f"{sizes / 40 / 1e6:.1f} MB/s"
    assert [news[3] for news in counted] == [
        f"{speed}, {left} left" for left in ("30 s", "20 s", "10 s", "0 s")
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (600, "10 min"), (8000, "2.2 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert board.duration(seconds) == text


def test_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.progress() as advance:
        for second in range(0, 100, 10):
            clock[0] = second
            advance("encoding", 1000 + second, 5000, "12.3 MB/s, 4 min left")
    assert capsys.readouterr().err.splitlines() == [
        f"encoding: {count} of 5,000, 12.3 MB/s, 4 min left"
        for count in ("1,030", "1,060", "1,090")
    ]
    with progress.progress(speaks=False) as advance:
        clock[0] = 1000
        advance("encoding", 1, 2)
    assert capsys.readouterr().err == ""


def test_bars_without_a_known_total_show_no_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    console = partial(Console, file=shown, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "Console", lambda **_: console())
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with progress.progress() as advance:
        advance("training the tokenizer", 0, 0)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    assert re.search(r"training the tokenizer .* 0:00:0\d elapsed", text) and "%" not in text
    shown.truncate(0)
    with progress.progress() as advance:
        advance("training the tokenizer", 0, 0)
        advance("training the tokenizer", 1, 1)
        advance("encoding", 1, 4, "3 MB/s")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    assert re.search(r"training the tokenizer .* 100%", text)
    assert re.search(r"encoding .* 25% 0:00:0\d elapsed 3 MB/s", text)


def test_a_line_without_a_known_total(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    with progress.progress() as advance:
        advance("training the tokenizer", 0, 0)
    assert capsys.readouterr().err == "training the tokenizer\n"
