"""Finding prepared corpora by the names that people give: a folder, a run, a name below data/."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dtt.config.data import Data
from dtt.config.load import load_config
from dtt.config.schema import Config
from dtt.data.corpora import Corpora, Portion, open_corpora
from dtt.data.preparation.prepare import Corpus, open_corpus
from dtt.errors import CheckpointError, ConfigError, DataError

DATA, RUNS = Data().dir, Config().dir


@dataclass(frozen=True)
class Found:
    """Prepared corpora, and the run that was trained on them where a run was named."""

    corpora: Corpora
    run: Path | None = None
    config: Config | None = None

    def corpus(self, name: str | None) -> Corpus:
        """Return one corpus: the only one, or that called `name` in the run's mixture."""
        named = {portion.name: portion.corpus for portion in self.corpora.portions}
        if name is None and len(named) == 1:
            return next(iter(named.values()))
        if name not in named or not name:
            sources = ", ".join(filter(None, named))
            if not sources:
                what = f"--source {name}: {self.run or self.corpora.folders} is not a mixture"
                raise ConfigError(what, "leave --source out")
            what = f"{self.run} was trained on a mixture"
            if name is not None:
                what = f"--source {name}: the mixture of {self.run} has none of that name"
            raise ConfigError(what, f"choose a --source: {sources}")
        return named[name]


def find_corpora(name: str) -> Found:
    """Open what `name` says: a prepared folder, a run folder, or a name below data/ (or the
    beginning of one). DataError lists what is there instead."""
    path = Path(name)
    if _is_run(path):
        return _of_run(path)
    if (path / "manifest.json").is_file():
        return _single(path)
    below = corpora_named(name)
    if len(below) == 1:
        return _single(below[0])
    if below:
        names = ", ".join(folder.name for folder in below)
        raise DataError(f"{name} is the beginning of several corpora", f"choose one of: {names}")
    if _is_run(RUNS / name):
        raise DataError(f"{name} is not a corpus", f"did you mean {RUNS / name}?")
    has = ", ".join(str(folder) for folder in _folders(DATA)[:8]) or "nothing"
    raise DataError(
        f"{name} is not a prepared corpus, a run folder, or a name below {DATA}/",
        f"prepared there: {has}",
    )


def corpora_named(name: str) -> list[Path]:
    """Return the prepared folder `name` below data/, or those whose names begin so."""
    below = [folder for folder in _folders(DATA) if folder.name.startswith(name)]
    return [folder for folder in below if folder.name == name] or below


def _single(folder: Path) -> Found:
    return Found(Corpora(Data(), (Portion("", open_corpus(folder), 1.0),)))


def _of_run(run: Path) -> Found:
    config = load_config([str(run / "config.yaml")])
    names = _trained_on(run)
    for base in (config.data.dir, run.resolve().parent.parent / config.data.dir):
        if all((base / name / "manifest.json").is_file() for name in names):
            data = config.data.model_copy(update={"dir": base})
            return Found(open_corpora(data, names), run, config)
    raise DataError(
        f"{run} was trained on {' and '.join(names)}, which is not below {config.data.dir}",
        "start this where the run was started, or prepare the data again with `dtt tokenize`",
    )


def _trained_on(run: Path) -> list[str]:
    """The folders of a run's corpora, as its newest checkpoint says."""
    states = sorted((run / "checkpoints").glob("step-*/state.json"))
    if not states:
        raise CheckpointError(
            f"{run} has no checkpoint yet, which would say what it is trained on",
            f"name the prepared folder below {DATA}/",
        )
    try:
        names: str = json.loads(states[-1].read_bytes())["corpus"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{states[-1]} does not say what the run is trained on") from None
    return names.split("+")


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def _folders(base: Path) -> list[Path]:
    if not base.is_dir():
        return []
    return sorted(path for path in base.iterdir() if (path / "manifest.json").is_file())
