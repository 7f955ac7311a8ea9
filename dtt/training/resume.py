"""What may change between the parts of a run, and what makes it another run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from dtt.config.schema import Config
from dtt.data.corpora import Corpora
from dtt.errors import CheckpointError
from dtt.tokenizer import fingerprint
from dtt.training.saved import Saved

IDENTITY = (
    "seed",
    "model",
    "tokenizer",
    "data",
    "training.batch_size",
    "optimizer.name",
)
"""Settings that a continued run must share with its checkpoint..."""
PLACES = (
    *("model.preset", "data.dir", "data.workers", "tokenizer.path"),
    *("data.source.path", "data.mixture.*.source.path", "data.mixture.*.name"),
)
FREE = ("model.dropout", *PLACES)
"""...but for these."""
SILENT = ("name", "dir", "logging", "parallel", *PLACES)
"""Changes that are not worth a line."""


def refuse_other_run(
    config: Config,
    saved: Saved,
    before: Config,
    corpora: Corpora,
    note: Callable[[str], None],
) -> None:
    """Raise CheckpointError if `saved` is of another run than `config`; note what else changed."""
    refused, changed = [], []
    for path, old, new in differences(
        before.model_dump(mode="json"), config.model_dump(mode="json")
    ):
        if _covered(path, IDENTITY) and not _covered(path, FREE):
            refused.append(f"{path}: {old} -> {new}")
        elif not _covered(path, SILENT):
            changed.append(f"{path}: {old} -> {new}")
    before_corpus = saved.state.get("corpus")
    # A vocabulary that follows from the text is no setting that somebody changed.
    follows = [line for line in refused if line.startswith("model.vocab_size:")] == refused
    if refused and not (follows and before_corpus != corpora.name):
        raise CheckpointError(
            f"checkpoint {saved.path} was trained with other settings ({'; '.join(refused)})",
            "give this run another --name, restore the settings, or say --fresh to start over",
        )
    if before_corpus != corpora.name:  # a name that holds a hash of the text
        raise CheckpointError(
            f"checkpoint {saved.path} was trained on other tokens ({before_corpus}) than the text "
            f"and the tokenizer give now ({corpora.name})",
            "restore them, give this run another --name, or say --fresh to start over",
        )
    if fingerprint(corpora.tokenizer) != saved.state["tokenizer"]:
        raise CheckpointError(
            f"checkpoint {saved.path} was trained with another tokenizer than the prepared text",
            "give this run another --name, or use the run's tokenizer.json",
        )
    if changed:
        note(f"settings changed since step {saved.step}: {'; '.join(changed)}")


def differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted path, old value, new value) of every leaf that differs."""
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            a, b = (dict(zip(map(str, range(len(x))), x, strict=True)) for x in (a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


def _covered(path: str, names: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, name) or fnmatchcase(path, f"{name}.*") for name in names)
