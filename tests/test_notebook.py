"""The example notebook runs, and what is written in it is what it gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "run.ipynb"


def shown(notebook: Any) -> list[tuple[str, str]]:
    """(kind, text) of every output, in order; pictures have no text."""
    return [
        (output.output_type, output.get("text") or output.get("data", {}).get("text/plain", ""))
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    ]


@pytest.mark.thorough
@pytest.mark.processes
def test_the_notebook_gives_what_is_written_in_it(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLE, as_version=4)
    written = shown(notebook)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        coalesce_streams=True,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()  # an error in a cell is raised here
    found = shown(notebook)
    assert [kind for kind, _ in found] == [kind for kind, _ in written]
    # Losses are the same up to rounding, which differs between machines.
    before, after = (
        [float(loss) for loss in re.findall(r"(?:val_)?loss (\d\.\d+)", text[0][1])]
        for text in (written, found)
    )
    assert len(before) >= 6 and after == pytest.approx(before, rel=0.05)
    table = next(text for kind, text in found if kind == "execute_result")
    assert table.splitlines()[0].split() == ["loss", "lr", "grad_norm", "tokens", "val_loss"]
    assert "NaN" in table  # no validation after the first step
    assert (tmp_path / "runs" / "notebook" / "metrics.jsonl").is_file()
