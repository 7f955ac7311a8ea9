"""metrics.jsonl keeps every digit and one line per step; the reporter speaks once, and clearly."""

from __future__ import annotations

import io
import json
import logging
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from dtt.metrics.loggers import (
    MetricsFile,
    Reporter,
    metrics_table,
    perplexity,
    read_metrics,
)


def written(path: Path, resumed: int, *rows: tuple[int, float]) -> None:
    file = MetricsFile(path, resumed)
    for step, loss in rows:
        file.write(step=step, loss=loss)
    file.close()


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


def test_numbers_keep_all_their_digits(tmp_path: Path) -> None:
    path, values = tmp_path / "metrics.jsonl", [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308]
    written(path, 0, *enumerate(values, 1))
    assert [row["loss"] for row in read_metrics(path)] == values


def test_lines_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, 0, (1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0))
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 4, "val_loss": 1.5}) + "\n")
    before = path.read_bytes()
    written(path, 4)
    assert path.read_bytes() == before
    written(path, 2, (3, 2.5))
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [
        (1, 4.0),
        (2, 3.0),
        (3, 2.5),
    ]
    written(path, 0)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step"', b"\0\0\0\0", b"null\n", b"[]\n"])
def test_a_torn_last_line_is_left_out(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, 0, (1, 4.0), (2, 3.0))
    path.write_bytes(path.read_bytes() + torn)
    if not torn.endswith(b"\n"):
        assert steps(path) == [1, 2]
    written(path, 2, (3, 2.0))
    assert steps(path) == [1, 2, 3]


def test_a_last_line_without_its_end_does_not_run_into_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, 0, (1, 4.0), (2, 3.0))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    written(path, 2, (3, 2.0))
    assert steps(path) == [1, 2, 3]


def test_flush_makes_lines_visible(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write(step=1, loss=1.0)
    file.flush()
    assert steps(tmp_path / "metrics.jsonl") == [1]
    file.close()


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0 and perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e9) == math.inf


def test_the_reporter_writes_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = Reporter(tmp_path, "info")
    reporter.total(200)
    figures = {"loss": 2.0, "lr": 1e-3, "grad_norm": 0.5}
    reporter.step(20, figures | {"tokens_per_second": 34_460.0, "seconds_left": 90.0})
    reporter.info("[bold] is no markup")
    reporter.warning("look out")
    reporter.trace("a traceback")
    reporter.close()
    out, err = capsys.readouterr()
    line = "step  20/200  loss 2.0000  ppl 7.389  lr 1.00e-03  grad 0.50  34.5k tok/s  1m30s left"
    assert out == f"{line}\n[bold] is no markup\n"
    assert err == "dtt: warning: look out\n"
    log = (tmp_path / "logs" / "train.log").read_text(encoding="utf-8").splitlines()
    assert [entry.split(" ", 2)[2] for entry in log] == [
        f"INFO {line}",
        "INFO [bold] is no markup",
        "WARNING look out",
        "ERROR a traceback",
    ]


FIGURES = {"loss": 2.0, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 950.0, "mfu": 0.413}
FIGURES |= {"seconds_left": 90.0, "interval_seconds": 2.0, "time_data": 0.25, "time_saving": 0.01}


def test_lines_say_what_slows_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(tmp_path, "info")
    reporter.total(200)
    reporter.step(3, FIGURES)
    reporter.close()
    assert capsys.readouterr().out.endswith("950 tok/s  MFU 41%  1m30s left  (data 12%)\n")


def test_on_a_terminal_steps_are_rows_of_a_table(tmp_path: Path) -> None:
    reporter, out = Reporter(tmp_path, "info"), io.StringIO()
    reporter._console = Console(file=out, force_terminal=True, width=80, highlight=False)
    reporter.total(4000)
    with reporter.bar(0):
        for step in range(1, 31):
            reporter.advance(step, 2.0)
            reporter.step(step, FIGURES | {"loss": 12.5, "tokens_per_second": 999e3, "mfu": 1})
    reporter.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    heads = [line for line in lines if "tok/s" in line]
    rows = [line for line in lines if line.lstrip().startswith(("1/", "30/")) and "2.683" in line]
    assert len(heads) == 2 and len(rows) == 2  # a head again after some rows
    assert all(row.endswith("  (data 12%)") for row in rows)  # not wrapped
    table = [*heads, *(row.removesuffix("  (data 12%)") for row in rows)]
    assert len({len(line) for line in table}) == 1
    assert any("step 30/4000" in line and "loss 2.000" in line for line in lines)  # the live line
    log = (tmp_path / "logs" / "train.log").read_text(encoding="utf-8").splitlines()
    assert len(log) == 30 and "tok/s  MFU 100%" in log[0]  # lines there, whatever the console has


def test_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for level, out, err in (("warning", "", "dtt: warning: b\n"), ("error", "", "")):
        reporter = Reporter(tmp_path, level)
        reporter.info("a")
        reporter.warning("b")
        reporter.close()
        assert capsys.readouterr() == (out, err)


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(None, "debug")
    reporter.info("a")
    reporter.warning("b")
    with reporter.bar(0):
        reporter.advance(1)
    reporter.close()
    assert capsys.readouterr() == ("", "")
    assert logging.getLogger("dtt.training").handlers == []


def test_the_table_has_a_row_for_each_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.5},
        {"step": 2, "val_loss": 2.75, "val_floor": None},
        {"step": 3, "loss": 2.0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    assert metrics_table(path) == {
        "step": [1, 2, 3],
        "loss": [3.0, 2.5, 2.0],
        "val_loss": [None, 2.75, None],
        "val_floor": [None, None, None],
    }
