"""`dtt plot`: curves of one figure of several runs, along steps, tokens or seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dtt.cli import main
from dtt.training.curves import metrics_of, read_curve, smooth


def row(step: int, **figures: Any) -> str:
    return json.dumps({"step": step, **figures}) + "\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four steps of ten tokens; 2 s for the first two, 6 s for the others; a torn last line."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    lines = [row(step, loss=5.0 - step, lr=0.1, tokens=10 * step) for step in (1, 2)]
    lines += [row(2, tokens_per_second=10.0, interval_seconds=2.0)]
    lines += [row(step, loss=5.0 - step, lr=0.1, tokens=10 * step) for step in (3, 4)]
    lines += [row(4, tokens_per_second=3.0, interval_seconds=6.0)]
    lines += [row(4, val_loss=1.5, val_floor=None), row(4, interval_seconds=1.0), '{"step": 5, "lo']
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_axes(run: Path) -> None:
    curve = read_curve(run, "loss", "step")
    assert (curve.name, curve.x, curve.y) == ("a", [1, 2, 3, 4], [4, 3, 2, 1])
    assert read_curve(run, "loss", "tokens").x == [10, 20, 30, 40]
    assert read_curve(run, "loss", "seconds").x == [1, 2, 5, 8]  # straight between known ones
    assert read_curve(run, "tokens_per_second", "tokens").x == [20, 40]
    assert read_curve(run, "val_loss", "seconds").x == [8]


def test_figures_that_can_be_drawn() -> None:
    rows = [{"step": 1, "loss": 2.0, "samples": 3}, {"step": 1, "val_loss/x": 1.0, "floor": None}]
    assert metrics_of(rows) == ["loss", "val_loss/x"]


def test_smoothing_keeps_a_constant_and_has_no_start_up() -> None:
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smooth([4.0, 2.0])[0] == 4.0


@pytest.mark.parametrize("words", [["--log"], ["--x", "seconds", "-o", "out.svg"]])
def test_pictures_of_several_runs(
    run: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    other = run.parents[1] / "elsewhere" / "a"
    other.mkdir(parents=True)
    (other / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    assert main(["plot", "runs/a", "elsewhere/a", *words]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "runs/a: 4 points, last 1, lowest 1"  # two runs of one name: their paths
    made = Path(out[-1])
    assert made.name == ("out.svg" if "-o" in words else "loss.png")
    content = made.read_bytes()
    assert content[:4] == b"\x89PNG" or b"<svg" in content
    assert len(content) > 5000


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--metric", "los"], 2, "runs/a has no metric 'los', did you mean loss? it has loss, lr"),
        (["--metric", "tokens"], 2, "has no metric 'tokens'; it has loss, lr, tokens_per_second"),
        (["-o", "x.doc"], 2, "-o x.doc: should end in .png, .svg or .pdf"),
        (["runs/b"], 4, "runs/b is no run: it has no metrics.jsonl; give a run's folder"),
        (["runs/empty"], 4, "runs/empty/metrics.jsonl is empty; train for at least one step"),
        (["--x", "sec"], 2, "--x: invalid choice: 'sec'"),
    ],
)
def test_mistakes_are_one_line(
    run: Path, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.parent / "empty").mkdir()
    (run.parent / "empty" / "metrics.jsonl").touch()
    assert main(["plot", "runs/a", *words]) == code
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_logarithm_needs_what_is_above_zero(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (run / "metrics.jsonl").open("w", encoding="utf-8") as file:
        file.write(row(1, loss=0.0))
    assert main(["plot", "runs/a", "--log"]) == 2
    assert "loss is not above zero everywhere" in capsys.readouterr().err
