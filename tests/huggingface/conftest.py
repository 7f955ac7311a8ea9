"""The stand-in for the Hub lies with the tests of data; nothing here goes to the network."""

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "data"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def dtt(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process; returns its exit code, stdout and stderr."""
    from dtt.cli import main

    def run(*words: str) -> tuple[int, str, str]:
        code = main(list(words))
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


@pytest.fixture
def text_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with text.txt in it; nothing waits for the disk."""
    from stock_models import quick_files

    monkeypatch.chdir(tmp_path)
    quick_files(monkeypatch)
    draw = random.Random(0)
    words = ("the cat", "a dog", "saw", "it's big", "ran from", "and")
    text = "".join(draw.choice(words) + (".\n" if i % 9 == 8 else " ") for i in range(1200))
    Path("text.txt").write_text(text)
