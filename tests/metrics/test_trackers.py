"""TensorBoard, W&B and MLflow, each read with its own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb_server import WandbServer, history

from dtt.config.schema import Logging
from dtt.errors import ConfigError
from dtt.metrics.background import Background
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


def opening(folder: Path, said: list[str], step: int = 0) -> Opening:
    return Opening(folder, {"model": {"dim": 32}}, YAML, step, said.append)


def drawn(folder: Path) -> Path:
    """A picture as a run leaves it."""
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    figure = Figure(figsize=(1, 0.5), dpi=20)
    figure.savefig(folder / "loss.png")
    return folder / "loss.png"


def fill(folder: Path, name: str, steps: range, said: list[str], step: int = 0) -> None:
    """Do what a run does with a tracker, behind its thread; it must be well."""
    made = Background(
        name, lambda say: TRACKERS[name](opening(folder, said, step)), said.append, patience=60
    )
    picture = drawn(folder)
    for number in steps:
        made.log(number, {"train/loss": 1 / number, "val/floor": None})
    made.text(steps[-1], "sample/Once", "Once upon\na time")
    made.picture(steps[-1], "loss", picture)
    made.close()


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
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    wandb = pytest.importorskip("wandb")
    wandb.teardown()


def offline_rows(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return history(file)


@pytest.mark.processes
def test_wandb_without_a_key_logs_offline(tmp_path: Path, alone: None) -> None:
    pytest.importorskip("wandb")
    said: list[str] = []
    fill(tmp_path / "run", "wandb", range(1, 4), said)
    assert len(said) == 1 and "no key here" in said[0] and "wandb sync" in said[0]
    rows = offline_rows(tmp_path / "run")
    losses = {row["_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == {1: 1.0, 2: 0.5, 3: 1 / 3}
    assert {"samples", "loss"} <= {name.split(".")[0] for row in rows for name in row}
    (table,) = (tmp_path / "run").glob("wandb/offline-run-*/files/media/table/*.json")
    expected = [[3, "sample/Once", "Once upon\na time"]]
    assert json.loads(table.read_text("utf-8"))["data"] == expected
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
    assert names == {"config.yaml", "loss.png", "sample-Once"}


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
    monkeypatch.setattr("dtt.metrics.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dtt\[mlflow\]'"):
        find_tracker("mlflow")


def test_passwords_in_addresses_stay_here() -> None:
    given = {"urls": ["https://me:secret@host/a.txt", "s3://b/c"], "n": 3, "text": "a@b"}
    expected = {"urls": ["https://host/a.txt", "s3://b/c"], "n": 3, "text": "a@b"}
    assert without_passwords(given) == expected
