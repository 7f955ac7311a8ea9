"""Documents that hold texts a model will be tested on."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtt import storage
from dtt.config.cleaning import Decontaminate
from dtt.data.cleaning.shingles import ngram_hashes, word_hashes
from dtt.data.cleaning.step import Dropped
from dtt.errors import DataError


class Decontamination:
    """Leaves out documents that share n words in a row with an evaluation text.

    The test is that of GPT-3 (Brown et al. 2020, appendix C: 13-grams, shorter texts down to 8
    words count whole); GPT-3 then cut the place out, dtt leaves the document out. It takes 8 bytes
    of memory for each word of the evaluation texts.
    """

    def __init__(self, settings: Decontaminate) -> None:
        self.settings = settings
        self.files = _find(settings.path)
        grams: dict[int, list[NDArray[np.uint64]]] = {}
        self.too_short = 0
        for path in self.files:
            for text in _texts(path, settings.separator):
                hashes = word_hashes(text)
                length = min(len(hashes), settings.ngram)
                if length < min(settings.shortest, settings.ngram):
                    self.too_short += 1
                    continue
                grams.setdefault(length, []).append(ngram_hashes(hashes, length))
        if not grams:
            raise DataError(
                f"data.cleaning: decontaminate: {', '.join(settings.path)} have no text of "
                f"{settings.shortest} words",
                "give other texts, or lower `shortest`",
            )
        self.grams = {n: np.unique(np.concatenate(found)) for n, found in sorted(grams.items())}

    def fingerprint(self) -> list[str]:
        """What the evaluation texts are."""
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.files]

    def __call__(self, text: str) -> str | Dropped:
        hashes = word_hashes(text)
        for n, known in self.grams.items():
            if len(hashes) < n:
                break
            found = ngram_hashes(hashes, n)
            places = np.minimum(np.searchsorted(known, found), len(known) - 1)
            if (known[places] == found).any():
                return Dropped("shares words with an evaluation text")
        return text


def _find(patterns: tuple[str, ...]) -> list[Path]:
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
        elif path.exists():
            found = [path]
        else:
            found = sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not found:
            raise DataError(
                f"data.cleaning: decontaminate: {pattern}: no such file, folder or glob",
                "check its path",
            )
        files += found
    return files


def _texts(path: Path, separator: str | None) -> Iterator[str]:
    """Yield the evaluation texts of a file."""
    try:
        with storage.storage_errors(path, "read"):
            content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8", "convert the file") from None
    if path.suffix != ".jsonl":
        yield from content.split(separator) if separator else [content]
        return
    for number, line in enumerate(content.splitlines(), 1):
        try:
            yield from _strings(json.loads(line)) if line.strip() else []
        except ValueError:
            raise DataError(f"{path}:{number}: not a JSON value", "mend or remove it") from None


def _strings(value: Any) -> Iterator[str]:
    """Yield every text inside a JSON value, names of fields left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
