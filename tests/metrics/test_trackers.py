"""TensorBoard, W&B and MLflow, each read with its own client."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_run import flags
from wandb_server import WandbServer, history

from dtt.config.schema import Logging
from dtt.errors import ConfigError
from dtt.metrics.background import Background, close_all
from dtt.metrics.trackers import (
    TRACKERS,
    Opening,
    TensorBoard,
    find_tracker,
    wanted,
    without_passwords,
)

KEY = "a" * 40
YAML = "model:\n  dim: 32\n"
BROKEN = """
from dtt.metrics.trackers import Wandb

class Broken(Wandb):
    def log(self, step, figures):
        super().log(step, figures)
        raise ConnectionError("gone")
"""


def opening(folder: Path, said: list[str], step: int = 0) -> Opening:
    return Opening(folder, {"model": {"dim": 32}}, YAML, step, said.append, said.append)


def drawn(folder: Path) -> Path:
    """A picture as a run leaves it."""
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    figure = Figure(figsize=(1, 0.5), dpi=20)
    figure.savefig(folder / "loss.png")
    return folder / "loss.png"


def behind(folder: Path, name: str, said: list[str], step: int = 0) -> Background:
    """A tracker behind its thread; all that it says is `said`."""
    return Background(
        name,
        lambda say, warn: TRACKERS[name](replace(opening(folder, [], step), say=say, warn=warn)),
        info=said.append,
        warn=lambda text: said.append(f"warning: {text}"),
    )


def fill(folder: Path, name: str, steps: range, said: list[str], step: int = 0) -> None:
    """Do what a run does with a tracker."""
    made = behind(folder, name, said, step)
    picture = drawn(folder)
    for number in steps:
        made.log(number, {"train/loss": 1 / number, "val/floor": None})
        made.text(number, "sample/Once", "Once upon\na time")
    made.text(steps[-1], "sample/The", "The end")
    made.picture(steps[-1], "loss", picture)
    close_all([made], 60)


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


def test_tensorboard_has_curves_texts_and_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    said: list[str] = []
    fill(tmp_path, "tensorboard", range(1, 4), said)
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
    ]
    assert found.Tags()["scalars"] == ["train/loss"]  # what is not known is not drawn
    texts = {
        name: found.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("sample/Once", "config")
    }
    assert texts["sample/Once"] == "    Once upon\n    a time"
    assert texts["config"] == "    model:\n      dim: 32"
    image = found.Images("loss")[0]
    assert (image.width, image.height) == (20, 10)
    assert image.encoded_image_string == (tmp_path / "loss.png").read_bytes()
    assert said == []


def test_tensorboard_draws_no_step_of_a_resumed_run_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    fill(tmp_path, "tensorboard", range(1, 8), [])
    fill(tmp_path, "tensorboard", range(5, 11), [], step=4)  # the checkpoint was at step 4
    assert [event.step for event in events(tmp_path).Scalars("train/loss")] == list(range(1, 11))


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of this machine's W&B or MLflow settings, and a home of its own."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("dtt.metrics.trackers.WANDB_FINISH_SECONDS", 60)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    wandb = pytest.importorskip("wandb")
    wandb.teardown()


def offline_rows(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return history(file)


@pytest.mark.processes
def test_wandb_without_a_key_logs_offline(tmp_path: Path, alone: None) -> None:
    wandb = pytest.importorskip("wandb")
    said: list[str] = []
    fill(tmp_path / "run", "wandb", range(1, 4), said)
    wandb.teardown()  # its service writes the end of the file after it has said that it is done
    assert len(said) == 1 and said[0].startswith("warning: W&B has no key here")
    assert "wandb sync" in said[0]
    rows = offline_rows(tmp_path / "run")
    losses = {row["_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == {1: 1.0, 2: 0.5, 3: 1 / 3}
    assert {"samples", "loss"} <= {name.split(".")[0] for row in rows for name in row}
    tables = (tmp_path / "run").glob("wandb/offline-run-*/files/media/table/*.json")
    longest = max((json.loads(table.read_text("utf-8"))["data"] for table in tables), key=len)
    assert longest == [  # of one step
        [3, "sample/Once", "Once upon\na time"],
        [3, "sample/The", "The end"],
    ]
    assert not any("val/floor" in row for row in rows)


@pytest.mark.processes
def test_wandb_goes_on_with_the_same_run(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        said: list[str] = []
        fill(tmp_path / "run", "wandb", range(1, 4), said)
        wandb.teardown()
        fill(tmp_path / "run", "wandb", range(4, 7), said, step=3)
        wandb.teardown()
    note = json.loads((tmp_path / "run/wandb/dtt.json").read_text("utf-8"))
    assert list(server.history) == [note["id"]]
    rows = [row for row in server.history[note["id"]] if "train/loss" in row]
    assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert json.loads(server.configs[note["id"]])["model"]["value"] == {"dim": 32}
    assert [line.split(":")[0] for line in said] == ["W&B", "W&B"]
    held = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(KEY.encode() in path.read_bytes() for path in held)


@pytest.mark.processes
def test_wandb_gives_up_on_a_server_that_died(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the time that it is given; by itself it would go on for as long as it is let."""
    pytest.importorskip("wandb")
    monkeypatch.setattr("dtt.metrics.trackers.WANDB_FINISH_SECONDS", 1)
    with WandbServer() as server:
        server.dies = True
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        said: list[str] = []
        made = behind(tmp_path / "run", "wandb", said)
        made.log(1, {"train/loss": 1.0})
        close_all([made], 60)
    assert [line.split(":")[0] for line in said] == ["W&B", "warning"]
    (folder,) = tmp_path.glob("run/wandb/run-*")
    text = f"W&B did not take all figures in 1 s: `wandb sync {folder}` sends the rest"
    assert said[1] == f"warning: {text}"


@pytest.mark.thorough
@pytest.mark.processes
def test_a_run_ends_though_wandb_failed_and_its_server_died(
    folder: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has told W&B to finish then: it does so when the process ends, by itself without a
    limit. A process as people start it, since forked ones end without atexit."""
    pytest.importorskip("wandb")
    Path("broken.py").write_text(BROKEN, "utf-8")
    few = {"training.max_steps": "4", "evaluation.every": "0"}
    words = ["train", *flags(few | {"logging.trackers": "[broken:Broken]"})]
    with WandbServer() as server:
        server.dies = True
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        done = subprocess.run(
            [sys.executable, "-m", "dtt", *words],
            capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
    assert done.returncode == 0 and "done: 4 steps" in done.stdout, done.stderr
    assert "failed and is left alone from here on: ConnectionError: gone" in done.stderr


def test_mlflow_goes_on_with_the_same_run(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    said: list[str] = []
    fill(tmp_path / "run", "mlflow", range(1, 4), said)
    fill(tmp_path / "run", "mlflow", range(4, 6), said, step=3)
    assert said == []
    client = tracking.MlflowClient((tmp_path / "run/mlflow").as_uri())
    experiment = client.get_experiment_by_name("dtt")
    (run,) = client.search_runs([experiment.experiment_id])
    found = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in found) == [(n, 1 / n) for n in range(1, 6)]
    assert run.info.status == "FINISHED"
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert names == {"config.yaml", "loss.png", "sample-Once", "sample-The"}


def test_which_trackers_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine_only.py").write_text("def open_it(opening):\n    return opening\n", "utf-8")
    settings = Logging(tensorboard=True, trackers=("mine_only:open_it", "tensorboard"))
    assert wanted(settings) == ["tensorboard", "mine_only:open_it"]
    given = opening(tmp_path, [])
    assert find_tracker("mine_only:open_it")(given) is given  # type: ignore[comparison-overlap]
    assert find_tracker("tensorboard") is TensorBoard


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "'tensorbord' is not one of tensorboard, wandb, mlflow; give one of these"),
        ("no_such_module:x", "cannot be had: No module named 'no_such_module'; start where"),
        ("json:nothing", "cannot be had: module 'json' has no attribute 'nothing'"),
    ],
)
def test_a_tracker_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_tracker(name)


def test_a_tracker_that_is_not_installed_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dtt.metrics.trackers.is_installed", lambda name: False)
    with pytest.raises(ConfigError, match=r"pip install 'dtt\[mlflow\]'"):
        find_tracker("mlflow")


def test_a_folder_of_that_name_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ./wandb is, where a run without dtt left it."""
    monkeypatch.setitem(TRACKERS, "no_package", TensorBoard)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "no_package").mkdir()
    with pytest.raises(ConfigError, match="the package no_package is missing"):
        find_tracker("no_package")
    (tmp_path / "no_package" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert find_tracker("no_package") is TensorBoard


def test_passwords_in_addresses_stay_here() -> None:
    given = {"urls": ["https://me:secret@host/a.txt", "s3://b/c"], "n": 3, "text": "a@b"}
    expected = {"urls": ["https://host/a.txt", "s3://b/c"], "n": 3, "text": "a@b"}
    assert without_passwords(given) == expected
