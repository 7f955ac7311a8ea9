"""What may change between the parts of a run, and what makes it another run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dtt.config.schema import Config
from dtt.data.prepare import Corpus
from dtt.errors import CheckpointError
from dtt.tokenizer import fingerprint
from dtt.training.saved import Saved

IDENTITY = ("seed", "model", "tokenizer", "data", "training.batch_size", "optimizer.name")
"""Settings that a continued run must share with its checkpoint..."""
PLACES = ("model.preset", "data.dir", "data.workers", "data.source.path", "tokenizer.path")
FREE = ("model.dropout", *PLACES)
"""...but for these."""
SILENT = ("name", "dir", "logging", "parallel", *PLACES)
"""Changes that are not worth a line."""


def refuse_other_run(
    config: Config,
    saved: Saved,
    before: Config,
    corpus: Corpus,
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
    if refused:
        raise CheckpointError(
            f"checkpoint {saved.path} was trained with other settings ({'; '.join(refused)})",
            "give this run another --name, restore the settings, or say --fresh to start over",
        )
    before_corpus = saved.state.get("corpus")
    if before_corpus != corpus.folder.name:  # a name that holds a hash of the text
        raise CheckpointError(
            f"checkpoint {saved.path} was trained on other tokens ({before_corpus}) than the text "
            f"and the tokenizer give now ({corpus.folder.name})",
            "restore them, give this run another --name, or say --fresh to start over",
        )
    if fingerprint(corpus.tokenizer) != saved.state["tokenizer"]:
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
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


def _covered(path: str, names: tuple[str, ...]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)
