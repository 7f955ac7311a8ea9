"""TensorBoard, W&B, MLflow and a user's own: each gets the figures of every console line and of
every validation, samples as text, the configuration and the picture of the loss.

None of them is the record of a run: that is metrics.jsonl. Each runs behind a thread of its own
(dtt.metrics.background), so that it may be slow, fail, or have no network. Adding one: a class and
a row in TRACKERS.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import secrets
import struct
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dtt import storage
from dtt.config.schema import Logging
from dtt.errors import ConfigError
from dtt.machine import is_installed

PATIENCE = 15.0
"""Seconds that trackers have at the end, all together, for what they still have to send."""
WANDB_INIT_SECONDS = 20
"""wandb's own default is 90 s; where nothing answers it has then lasted 101 s."""
WANDB_FINISH_SECONDS = PATIENCE - 3
"""wandb's own default is to wait for its server without end, when the process ends too."""

Figures = Mapping[str, float | None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Opening:
    """What a tracker is made from."""

    folder: Path
    """The run folder."""
    config: dict[str, Any]
    """The configuration as JSON has it, without passwords in addresses."""
    yaml: str
    """The same as text."""
    step: int
    """The step from which the run goes on; 0 for a new one. Later ones are drawn anew."""
    say: Say
    """Says a line of news to the person, when the loop has time for it."""
    warn: Say
    """Says a warning, likewise."""


class Tracker(Protocol):
    """Something that shows curves. It may block and raise: neither reaches the run."""

    def log(self, step: int, figures: Figures) -> None:
        """Take figures by name, such as train/loss; None is one that is not known."""

    def text(self, step: int, name: str, text: str) -> None:
        """Take a text that the model wrote."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Take a picture, a PNG file."""

    def close(self) -> None:
        """Send or write what there is; nothing is called after it."""


class TensorBoard:
    """Event files in RUN/tensorboard, for `tensorboard --logdir RUN/tensorboard`."""

    def __init__(self, opening: Opening) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a crash left behind of later steps is not drawn beside what comes now.
        purge = opening.step + 1 if opening.step else None
        self._writer = SummaryWriter(str(opening.folder / "tensorboard"), purge_step=purge)
        self._writer.add_text("config", _indented(opening.yaml), opening.step)

    def log(self, step: int, figures: Figures) -> None:
        for name, value in figures.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, _indented(text), step)

    def picture(self, step: int, name: str, path: Path) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        png = path.read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        image = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=3)
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._writer._get_file_writer().add_summary(summary, step)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A W&B run of the project `dtt` (WANDB_PROJECT names another), which a resumed run goes on
    with; offline (`wandb sync` later) if WANDB_MODE says so, without a key or without the server.

    Its id is in RUN/wandb/dtt.json. A server has the figures of a step once: those that a resumed
    run computes again are the same, and it leaves them out.
    """

    def __init__(self, opening: Opening) -> None:
        import wandb

        self._wandb, self._warn, self._samples = wandb, opening.warn, list[tuple[int, str, str]]()
        note = opening.folder / "wandb" / "dtt.json"
        known = json.loads(note.read_text("utf-8")) if note.exists() else {}
        options: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", "dtt"),
            "name": opening.folder.name,
            "dir": str(opening.folder),
            "config": opening.config,
            "id": os.environ.get("WANDB_RUN_ID") or known.get("id") or secrets.token_hex(4),
            "resume": "allow",
            "settings": self._settings(),
        }
        storage.make_folder(note.parent)
        storage.write_atomic(note, json.dumps({"id": options["id"]}).encode())
        self._run = self._begin(opening, options)
        if not self._run.offline:
            opening.say(f"W&B: {self._run.url}")

    def _settings(self) -> Any:
        """Return what the client is told: how long it may wait, and to be silent."""
        limits = {
            "init_timeout": WANDB_INIT_SECONDS,
            "finish_timeout": WANDB_FINISH_SECONDS,
            "finish_timeout_raises": True,
        }
        known = self._wandb.Settings.model_fields  # older clients do not have all of these
        limits = {name: limit for name, limit in limits.items() if name in known}
        return self._wandb.Settings(console="off", silent=True, quiet=True, **limits)

    def _begin(self, opening: Opening, options: dict[str, Any]) -> Any:
        """Begin the run where its figures can be sent, or else on this disk."""
        wandb, mode = self._wandb, os.environ.get("WANDB_MODE", "online")
        later = f"it logs offline; `wandb sync {opening.folder}/wandb/offline-run-*` sends it later"
        if mode != "online":
            return wandb.init(**options, mode=mode)
        try:
            if wandb.login(prompt=False):
                return wandb.init(**options)
            opening.warn(f"W&B has no key here (WANDB_API_KEY, or `wandb login`): {later}")
        except wandb.Error as error:
            opening.warn(f"W&B is not reachable ({' '.join(str(error).split())[:200]}): {later}")
        return wandb.init(**options, mode="offline")

    def log(self, step: int, figures: Figures) -> None:
        self._run.log({k: v for k, v in figures.items() if v is not None}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        # Each table of a step replaces the one before; the last has all samples of the step.
        self._samples = [row for row in self._samples if row[0] == step] + [(step, name, text)]
        table = self._wandb.Table(columns=["step", "name", "text"], data=self._samples)
        self._run.log({"samples": table}, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        folder = Path(self._run.dir).parent
        try:
            self._run.finish()
        except TimeoutError:
            self._warn(
                f"W&B did not take all figures in {WANDB_FINISH_SECONDS:.0f} s: "
                f"`wandb sync {folder}` sends the rest"
            )


class Mlflow:
    """An MLflow run, in RUN/mlflow or where MLFLOW_TRACKING_URI says, which a resumed run goes on
    with; its id is in RUN/mlflow.json.

    MLflow keeps all that it gets: it has the steps that a resumed run does again twice.
    """

    def __init__(self, opening: Opening) -> None:
        from mlflow.tracking import MlflowClient

        address = os.environ.get("MLFLOW_TRACKING_URI")
        if address is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            address = (opening.folder / "mlflow").absolute().as_uri()
        self._client = MlflowClient(address)
        note = opening.folder / "mlflow.json"
        if note.exists():
            self._id = json.loads(note.read_text("utf-8"))["id"]
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "dtt")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._id = self._client.create_run(experiment, run_name=opening.folder.name).info.run_id
        storage.write_atomic(note, json.dumps({"id": self._id}).encode())
        self._client.log_text(self._id, opening.yaml, "config.yaml")

    def log(self, step: int, figures: Figures) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        known = [
            Metric(name, value, now, step) for name, value in figures.items() if value is not None
        ]
        self._client.log_batch(self._id, metrics=known)  # one request

    def text(self, step: int, name: str, text: str) -> None:
        safe = re.sub(r"[^\w.-]+", "-", name)
        self._client.log_text(self._id, text, f"{safe}/step-{step:08d}.txt")

    def picture(self, step: int, name: str, path: Path) -> None:
        self._client.log_artifact(self._id, str(path))

    def close(self) -> None:
        self._client.set_terminated(self._id)


TRACKERS: dict[str, Callable[[Opening], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}


def wanted(settings: Logging) -> list[str]:
    """Return the names of the trackers that the settings ask for, each once."""
    on = {"tensorboard": settings.tensorboard, "wandb": settings.wandb}
    return list(dict.fromkeys([*(name for name, yes in on.items() if yes), *settings.trackers]))


def find_tracker(name: str) -> Callable[[Opening], Tracker]:
    """Return what makes a tracker; ConfigError for one that is not known or not installed."""
    if name in TRACKERS:
        if not is_installed(name):
            raise ConfigError(
                f"logging: {name} is wanted, but the package {name} is missing",
                f"pip install 'dtt[{name}]', or leave it off",
            )
        return TRACKERS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ConfigError(
            f"logging.trackers: {name!r} is not one of {', '.join(TRACKERS)}",
            "give one of these, or your own as module:function",
        )
    sys.path.insert(0, os.getcwd())
    try:
        found: Callable[[Opening], Tracker] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"logging.trackers: {name} cannot be had: {error}",
            "start where the module is, or put its folder into PYTHONPATH",
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    return found


def without_passwords(value: Any) -> Any:
    """Return settings in which addresses have no user:password@ any more."""
    if isinstance(value, dict):
        return {key: without_passwords(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_passwords(inner) for inner in value]
    return re.sub(r"://[^/\s@]+@", "://", value) if isinstance(value, str) else value


def _indented(text: str) -> str:
    """Text as Markdown shows it unchanged."""
    return "\n".join(f"    {line}" for line in text.splitlines())
