"""Data sets of the Hugging Face Hub: from a name to files with sizes and hashes, at one commit.

`huggingface_hub` and `datasets` do the talking; dtt tries again where they do not (a status 5xx),
and remembers what they answered: what was selected once means the same files from then on, and
without the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtt import storage
from dtt.config.remote import Hub
from dtt.data.remote.fetch import Fetcher, is_offline
from dtt.data.remote.partial import RemoteFile
from dtt.data.remote.retries import TemporaryError, is_temporary, note, persist, retry_after
from dtt.errors import ConfigError, DataError
from dtt.version import __version__

SELECTS = ("dataset", "config", "split", "revision", "files")
"""The settings that say which files a source has."""
ASKED_AT_ONCE = 500
"""Paths per question for sizes and hashes."""
NETWORK = ("httpx", "httpcore", "requests", "urllib3", "aiohttp")
"""Packages whose exceptions are failures of the network."""


@dataclass(frozen=True)
class Selection:
    """The files that a source means, in order."""

    name: str
    """The source and its version in words."""
    files: tuple[RemoteFile, ...]
    lock: Path
    """Held by the process that downloads."""
    fetcher: Fetcher


def select(settings: Hub, folder: Path, *, update: bool = False) -> Selection:
    """Return what the settings mean: as recorded below `folder`, else (or to `update`) as the Hub
    says. DataError: it is not recorded and the network may not be used, or the Hub refuses."""
    home = folder / "hub" / settings.dataset.replace("/", "--")
    wanted = {name: getattr(settings, name) for name in SELECTS}
    key = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:12]
    path, lock = home / "selections" / f"{key}.json", home / ".lock"
    found = None if update else _read(path)
    if found is None:
        if settings.offline or is_offline():
            raise DataError(
                f"{_title(settings)} is not in {folder}, and the network is not to be used",
                f"run `dtt download -d {settings.dataset}` with these settings where it may be",
            )
        hub = _package("huggingface_hub")
        with storage.exclusive(lock, lambda: note(f"waiting for the download of {home.name}")):
            found = None if update else _read(path)
            if found is None:
                where = f"{settings.dataset} at {hub.HfApi().endpoint}"
                found = persist(where, lambda: _ask(hub, settings))
                storage.make_folder(path.parent)
                storage.write_atomic(path, json.dumps(wanted | found, indent=1) + "\n")
    endpoint, fetcher = _client(settings)
    base = f"{endpoint}/datasets/{settings.dataset}/resolve/{found['commit']}"
    files = tuple(
        RemoteFile(
            f"{base}/{urllib.parse.quote(row['path'])}",
            _inside(home / found["commit"], row["path"]),
            row["size"],
            row.get("sha256"),
            row.get("blob"),
            found["commit"],
        )
        for row in found["rows"]
    )
    name = f"{_title(settings)} at {found['commit'][:10]}"
    return Selection(name, files, lock, fetcher)


def _title(settings: Hub) -> str:
    said = (settings.config, settings.split if not settings.files else ", ".join(settings.files))
    return f"{settings.dataset} ({', '.join(filter(None, said))})"


def _read(path: Path) -> dict[str, Any] | None:
    """A recorded selection; None: there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())
        return found if {"commit", "rows"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _inside(folder: Path, name: str) -> Path:
    """`name` below `folder`; a repository may have any names in it."""
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute():
        raise DataError(f"the data set has a file {name!r}, which would be outside of {folder}")
    return folder / name


def _package(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise ConfigError(
            f"data sets of the Hub need the Python package {name!r}", "pip install 'dtt[data]'"
        ) from None


def _ask(hub: Any, settings: Hub) -> dict[str, Any]:
    """The commit of the revision, and its files as rows. TemporaryError: worth another try."""
    api = hub.HfApi(library_name="dtt", library_version=__version__)
    with _explained(settings, api.endpoint, hub.get_token()):
        info = api.dataset_info(settings.dataset, revision=settings.revision)
        if info.gated and hub.get_token() is None:
            raise _gated(settings, api.endpoint, None)
        if settings.files:
            rows = _matching(hub, api, settings, info.sha)
        else:
            names = _split_files(settings, info.sha)
            rows = _file_rows(api, settings, info.sha, names)
    return {"commit": info.sha, "rows": rows}


def _split_files(settings: Hub, commit: str) -> list[str]:
    """Paths of a split's files as `datasets` finds them: by the card, else by their names."""
    datasets = _package("datasets")
    datasets.disable_progress_bars()
    builder = datasets.load_dataset_builder(settings.dataset, settings.config, revision=commit)
    splits = builder.config.data_files or {}
    if settings.split not in splits:
        raise DataError(
            f"{settings.dataset} has no split {settings.split!r}",
            f"set data.source.split to one of: {', '.join(map(str, splits)) or 'none'}",
        )
    root = f"hf://datasets/{settings.dataset}@{commit}/"
    urls = [str(url) for url in splits[settings.split]]
    foreign = [url for url in urls if not url.startswith(root)]
    if foreign:
        raise DataError(f"{settings.dataset} has files elsewhere: {foreign[0]}", "use source url")
    return [url.removeprefix(root) for url in urls]


def _file_rows(api: Any, settings: Hub, commit: str, names: list[str]) -> list[dict[str, Any]]:
    found: dict[str, Any] = {}
    for start in range(0, len(names), ASKED_AT_ONCE):
        some = names[start : start + ASKED_AT_ONCE]
        infos = api.get_paths_info(settings.dataset, some, revision=commit, repo_type="dataset")
        found |= {info.path: info for info in infos}
    return [_row(found[name]) for name in names]


def _matching(hub: Any, api: Any, settings: Hub, commit: str) -> list[dict[str, Any]]:
    """Rows of the files that match data.source.files (as snapshot_download's allow_patterns)."""
    tree = api.list_repo_tree(
        settings.dataset, recursive=True, revision=commit, repo_type="dataset"
    )
    files = {item.path: item for item in tree if hasattr(item, "blob_id")}
    for pattern in settings.files:
        if not list(hub.utils.filter_repo_objects(files, allow_patterns=[pattern])):
            few = ", ".join(sorted(files)[:5]) or "nothing"
            raise DataError(f"{settings.dataset} has no file {pattern}", f"it has {few}, ...")
    wanted = hub.utils.filter_repo_objects(sorted(files), allow_patterns=list(settings.files))
    return [_row(files[name]) for name in wanted]


def _row(info: Any) -> dict[str, Any]:
    row = {"path": info.path, "size": info.size}
    # A small file is in git itself and has git's hash, a large one a pointer with its SHA-256.
    return row | ({"sha256": info.lfs.sha256} if info.lfs else {"blob": info.blob_id})


def _client(settings: Hub) -> tuple[str, Fetcher]:
    """The Hub's address, and what downloads from it with the user's token."""
    try:
        import huggingface_hub
    except ModuleNotFoundError:  # what is recorded and here can be read without it
        return "https://huggingface.co", Fetcher()
    api = huggingface_hub.HfApi()

    token = huggingface_hub.get_token()

    def refused(status: int, url: str) -> DataError | None:
        return _gated(settings, api.endpoint, token) if status in (401, 403) else None

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return api.endpoint, Fetcher(headers, refused=refused)


def _gated(settings: Hub, endpoint: str, token: str | None) -> DataError:
    if token:
        return DataError(
            f"{settings.dataset} is gated, and the account of your token has no access to it yet",
            f"ask for it at {endpoint}/datasets/{settings.dataset}, or log in with an account that "
            "has it (`hf auth whoami` says which one you use)",
        )
    return DataError(
        f"the Hub gives {settings.dataset} only to whom its owners let in",
        f"ask at {endpoint}/datasets/{settings.dataset}, then log in with `hf auth login` "
        "(or set HF_TOKEN)",
    )


@contextlib.contextmanager
def _explained(settings: Hub, endpoint: str, token: str | None) -> Iterator[None]:
    """Turn what the client libraries raise into a line, or a TemporaryError."""
    try:
        yield
    except (DataError, ConfigError):
        raise
    except Exception as error:
        raise _explanation(error, settings, endpoint, token) from error


def _explanation(error: Exception, settings: Hub, endpoint: str, token: str | None) -> Exception:
    kinds = {kind.__name__ for cause in causes(error) for kind in type(cause).__mro__}
    text = " ".join(str(error).split())[:300]
    name = settings.dataset
    if (problem := temporary(error)) is not None:
        return problem
    # `datasets` says it in a DatasetNotFoundError that may have lost its cause.
    if "GatedRepoError" in kinds or "is a gated dataset" in text:
        return _gated(settings, endpoint, token)
    if "RevisionNotFoundError" in kinds:
        return DataError(f"{name} has no revision {settings.revision!r}", "check data.source")
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return DataError(
            f"there is no data set {name} at {endpoint} (and no such file here), or it is private",
            "check the name, or log in with `hf auth login`",
        )
    if "Config" in text and isinstance(error, ValueError):
        return DataError(f"{name}: {text}", "set data.source.config")
    if "DataFilesNotFoundError" in kinds:
        return DataError(f"{name}: {text}", "name its files with data.source.files")
    if isinstance(error, OSError | ValueError):
        return DataError(f"{name}: {text}", "name its files with data.source.files")
    return error


def temporary(error: BaseException) -> TemporaryError | None:
    """Return the failure of the network, or of a busy server, that led to an error, with the time
    that the server asks for; None: another try would end alike."""
    if any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in causes(error)):
        return None
    for cause in causes(error):
        response = getattr(cause, "response", None)
        status = getattr(response, "status_code", 0)
        if response is not None and is_temporary(status):
            after = retry_after(response.headers.get("Retry-After"))
            return TemporaryError(f"HTTP status {status}", after)
        if not status and of_network(cause):
            return TemporaryError(" ".join(str(cause).split())[:300] or type(cause).__name__)
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def of_network(error: BaseException) -> bool:
    """Whether it is a failure of the network, and no answer of a server."""
    package = type(error).__module__.partition(".")[0].rstrip("0123456789")
    return package in NETWORK or isinstance(error, ConnectionError | TimeoutError)
