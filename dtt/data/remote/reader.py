"""Sources that are downloaded first: a data set of the Hub, or files at URLs.

Below FOLDER (data/downloads) are hub/ORG--NAME/COMMIT/<path in the repository> and
url/HOST/<hash of the address>/NAME, each file with its record beside it (`partial`);
hub/ORG--NAME/selections/ says which files settings meant, and samples/ holds first documents.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from dtt import storage
from dtt.config.remote import Hub, Url
from dtt.config.sources import COMPRESSIONS, Records, Text, record_format
from dtt.data.remote import hub
from dtt.data.remote.fetch import Fetcher, is_offline
from dtt.data.remote.hub import Selection
from dtt.data.remote.partial import RemoteFile, shown
from dtt.data.remote.transfer import bring, size_text
from dtt.errors import DataError

if TYPE_CHECKING:
    from dtt.data.sources import Document, Part, SourceReader

DOWNLOADS = Path("data/downloads")
READING = ("field", "template", "separator", "on_bad", "max_documents")
"""Settings that say how documents are read from the files."""
NOT_TEXT = (".csv", ".tsv", ".zip", ".tar", ".tgz", ".7z", ".rar", ".xml", ".html", ".pdf")


class RemoteReader:
    """Documents of files that are downloaded unless they are here, read as local files are."""

    def __init__(
        self, settings: Hub | Url, folder: Path = DOWNLOADS, selection: Selection | None = None
    ) -> None:
        self.settings = settings
        selection = selection or select(settings, folder)
        self._sample: Path | None = None
        if settings.max_documents is None:
            paths = download(settings, selection)
            self.reader = _open(settings, paths)
        else:
            self._sample = sample(settings, selection)
            plain = settings.model_copy(update={"field": "text", "template": None})
            self.reader = _open(plain, [self._sample])
        self.files = selection.files
        self.bad = self.reader.bad

    def documents(self) -> int | None:
        return self.reader.documents()

    def fingerprint(self) -> dict[str, Any]:
        identity = _identity(self.settings, self.files)
        if self._sample is not None:  # read by ranges, perhaps, of files that are not here
            identity["files"] = storage.file_digest(self._sample)
        return {"name": self.settings.name, **identity}

    def parts(self, tail: float) -> list[Part]:
        return self.reader.parts(tail)

    def read(self, part: Part) -> Iterator[Document]:
        return self.reader.read(part)


def select(settings: Hub | Url, folder: Path, *, update: bool = False) -> Selection:
    """The files that the settings mean, at most data.source.max_bytes of them; `update`: ask the
    Hub again. DataError: not to be found, refused, offline, or the first file is too large."""
    if isinstance(settings, Hub):
        found = hub.select(settings, folder, update=update)
    else:
        found = _url_selection(settings, folder)
    limit = settings.max_bytes
    if limit is None:
        return found
    found = measured(found, settings.offline)
    sizes = [file.said for file in found.files]
    if None in sizes:
        raise DataError(
            f"{found.name}: the server does not say how large its files are",
            "leave data.source.max_bytes out",
        )
    totals = list(itertools.accumulate(size or 0 for size in sizes))
    if totals[0] > limit:
        raise DataError(
            f"{found.name}: its first file alone has {size_text(totals[0])}, and "
            f"data.source.max_bytes is {size_text(limit)}",
            "raise it, or take the first data.source.max_documents instead",
        )
    return replace(found, files=found.files[: sum(total <= limit for total in totals)])


def download(settings: Hub | Url, selection: Selection) -> list[Path]:
    """Bring what is missing of the files, and return where they are. DataError when offline."""
    missing = sum(file.record() is None for file in selection.files)
    if missing and _is_offline(settings):
        raise DataError(
            f"{selection.name}: {missing} of {len(selection.files)} files are not here, and the "
            "network is not to be used",
            "run `dtt download` with these settings where it may be",
        )
    bring(
        selection.files,
        selection.fetcher,
        selection.lock,
        connections=settings.connections,
        what=selection.name,
    )
    return [file.path for file in selection.files]


def measured(selection: Selection, offline: bool) -> Selection:
    """The same files with what each has in bytes (`said`), asked for where it is not known; None:
    the server does not say."""

    def size(file: RemoteFile) -> int | None:
        record = file.record()
        known = record.size if record else file.said if file.size is None else file.size
        if known is None and not offline and not is_offline():
            known = selection.fetcher.size(file.url)
        return known

    files = tuple(replace(file, said=size(file)) for file in selection.files)
    return replace(selection, files=files)


def _is_offline(settings: Hub | Url) -> bool:
    return settings.offline or is_offline()


def _url_selection(settings: Url, folder: Path) -> Selection:
    """One folder per address: two of them may end in the same name."""
    files = []
    for url, digest in itertools.zip_longest(settings.urls, settings.sha256):
        parts = urlsplit(url)
        place = hashlib.sha256(url.encode()).hexdigest()[:12]
        name = (
            re.sub(r"[^\w.-]+", "-", Path(unquote(parts.path)).name).lstrip(".-")[-100:] or "file"
        )
        host = re.sub(r"[^\w.-]+", "-", parts.netloc)
        files.append(RemoteFile(url, folder / "url" / host / place / name, sha256=digest))
    lock = files[0].path.parent.parent / ".lock"
    name = shown(files[0].url) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    return Selection(name, tuple(files), lock, Fetcher())


def _open(settings: Hub | Url, paths: Sequence[Path | str]) -> SourceReader:
    """The reader of local files in the format that their names say."""
    from dtt.data.sources import open_source  # which has this module in its table

    names = tuple(str(path) for path in paths)
    kinds = {record_format(name) for name in names}
    unread = [name for name in names if name.lower().endswith(NOT_TEXT)]
    if len(kinds) > 1 or unread:
        odd = unread[0] if unread else names[-1]
        raise DataError(
            f"{odd}: not a text file, or not of the same format as the others",
            "choose files of JSON lines, Parquet or text "
            f"(data.source.{'files' if isinstance(settings, Hub) else 'urls'})",
        )
    if kinds == {None}:
        text = Text(path=names, separator=settings.separator, on_bad=settings.on_bad)
        return open_source(text)
    field = {"field": settings.field} if settings.template is None else {}
    records = Records(path=names, template=settings.template, on_bad=settings.on_bad, **field)
    return open_source(records)


def sample(settings: Hub | Url, selection: Selection) -> Path:
    """Write the first max_documents documents, a line each, and download no more than they need:
    nothing where more of them are here."""
    limit, found = settings.max_documents or 0, samples(settings, selection)
    path = _sample_path(settings, selection, str(limit))
    if limit in found:
        return path
    storage.make_folder(path.parent)
    with contextlib.ExitStack() as opened:
        more = min((count for count in found if count > limit), default=None)
        if more is not None:
            whole = _sample_path(settings, selection, str(more)).open("rb")
            lines: Iterator[bytes] = iter(opened.enter_context(whole))
        else:
            rows = _documents(settings, selection)
            lines = ((json.dumps({"text": text}) + "\n").encode() for text in rows)
        storage.write_stream_atomic(path, itertools.islice(lines, limit))
    return path


def samples(settings: Hub | Url, selection: Selection) -> list[int]:
    """How many first documents are here: the max_documents of each sample with these settings."""
    pattern = _sample_path(settings, selection, "*")
    counts = (path.stem.rpartition("-")[2] for path in pattern.parent.glob(pattern.name))
    return sorted(int(count) for count in counts if count.isdigit())


def _sample_path(settings: Hub | Url, selection: Selection, count: str) -> Path:
    wanted = [[file.url, file.revision, file.sha256] for file in selection.files]
    reading = [getattr(settings, name) for name in READING if name != "max_documents"]
    key = hashlib.sha256(json.dumps([wanted, reading]).encode()).hexdigest()[:12]
    return selection.lock.parent / "samples" / f"{key}-{count}.jsonl"


def _documents(settings: Hub | Url, selection: Selection) -> Iterator[str]:
    for file in selection.files:
        if _is_offline(settings) and file.record() is None:
            here = max(samples(settings, selection), default=0)
            raise DataError(
                f"{selection.name}: the first {settings.max_documents:,} documents are not here"
                + (f" (the first {here:,} are)" if here else "")
                + ", and the network is not to be used",
                "run `dtt download` with these settings where it may be"
                + (f", or set data.source.max_documents to {here} or less" if here else ""),
            )
        path = _by_ranges(settings, selection, file)
        paths: Sequence[Path | str] = (
            [path] if path else download(settings, replace(selection, files=(file,)))
        )
        yield from whole_documents(_open(settings, paths))


def _by_ranges(settings: Hub | Url, selection: Selection, file: RemoteFile) -> str | None:
    """The address of a file whose beginning can be read without the rest; None for others."""
    if not isinstance(settings, Hub) or _is_offline(settings) or file.record():
        return None
    name = file.path.relative_to(selection.lock.parent / file.revision).as_posix()
    if record_format(name) != "parquet" and not name.endswith(COMPRESSIONS):
        return None
    return f"hf://datasets/{settings.dataset}@{file.revision}/{name}"


def whole_documents(reader: SourceReader) -> Iterator[str]:
    """The texts of a source in order, those that are cut into pieces put together."""
    pieces: list[str] = []
    for part in reader.parts(0.0):
        for document in reader.read(part):
            pieces.append(document.text)
            if document.ends:
                yield "".join(pieces)
                pieces = []


def _identity(settings: Hub | Url, files: Iterable[RemoteFile]) -> dict[str, Any]:
    """What the corpus is: the files by their contents, and how they are read."""
    records = [(file.path.name, file.record()) for file in files]
    return {
        "files": [[name, record.size, record.sha256] for name, record in records if record],
        "reading": {name: getattr(settings, name) for name in READING},
    }
