"""Models of the Hugging Face Hub: brought here at one commit, and sent there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dtt.data.remote.hub import causes, of_network, temporary
from dtt.data.remote.retries import persist
from dtt.errors import CheckpointError, ConfigError, DataError, DttError, StorageError
from dtt.version import __version__

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""ORG/NAME."""
WANTED, UNWANTED = ("*.json", "*.safetensors"), ("*/*", "consolidated*")
"""Files of a model: no pickles, no code, nothing in folders."""


def _client() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise ConfigError(
            "models of the Hub need the Python package 'huggingface_hub'", "pip install 'dtt[hf]'"
        ) from None
    return huggingface_hub


def bring(name: str, revision: str | None, wanted: tuple[str, ...] = WANTED) -> tuple[Path, str]:
    """Return the folder of a model of the Hub, with the files `wanted` if they were not here yet,
    and its commit.

    A CheckpointError says why it cannot be had. Ranks may ask at once: one downloads, the others
    wait. HF_HUB_OFFLINE, HF_HOME and HF_ENDPOINT are honoured.
    """
    hub = _client()
    where = f"{name} at {hub.HfApi().endpoint}"

    def attempt() -> str:
        try:
            return str(
                hub.snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=list(wanted),
                    ignore_patterns=list(UNWANTED),
                    library_name="dtt",
                    library_version=__version__,
                )
            )
        except Exception as error:
            raise _failure(error, name, revision, where) from error

    try:
        folder = Path(persist(where, attempt))
    except DataError as error:
        raise _unreachable(name, where, error.what.removeprefix(where)) from error
    return folder, folder.name


def _unreachable(name: str, where: str, why: str = "") -> CheckpointError:
    return CheckpointError(
        f"no folder {name} is here, nor a download of it, and {where} cannot be reached{why}",
        "check the network or HF_HUB_OFFLINE, or download it where there is one (`hf download "
        f"{name}`)",
    )


def _failure(error: Exception, name: str, revision: str | None, where: str) -> Exception:
    kinds = {kind.__name__ for cause in causes(error) for kind in type(cause).__mro__}
    text = " ".join(str(error).split())[:300]
    if (problem := temporary(error)) is not None:
        return problem
    if "LocalEntryNotFoundError" in kinds:
        return _unreachable(name, where)
    if "GatedRepoError" in kinds:
        return CheckpointError(
            f"{where} is given only to whom its owners let in",
            "ask for it on its page, then log in with `hf auth login` (or set HF_TOKEN)",
        )
    if "RevisionNotFoundError" in kinds:
        return CheckpointError(f"{name} has no revision {revision!r}", "check init_from")
    if "RepositoryNotFoundError" in kinds:
        return CheckpointError(
            f"there is no model {where} (and no such folder here), or it is private",
            "check init_from, or log in with `hf auth login`",
        )
    if isinstance(error, OSError | ValueError):
        return CheckpointError(f"{where}: {text}", "check init_from")
    return error


def _status(error: Exception) -> int:
    for cause in causes(error):
        response = getattr(cause, "response", None)
        if response is not None:
            return int(response.status_code)
    return 0


def refuse_bad_name(name: str) -> None:
    """Raise ConfigError now for what `send` could not do after all the work."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"--push: should be ORG/NAME, got {name!r}")
    _client()


def send(folder: Path, name: str, message: str) -> str:
    """Upload a folder to the model `name` of the Hub, which is made if it is not there; return its
    address. A DttError says in a line why it cannot be done; the folder stays as it is."""
    hub = _client()
    api = hub.HfApi(library_name="dtt", library_version=__version__)
    try:
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except Exception as error:
        raise _refusal(error, folder, name, api.endpoint) from error
    return f"{api.endpoint}/{name}"


def _refusal(error: Exception, folder: Path, name: str, endpoint: str) -> DttError | Exception:
    status, text = _status(error), " ".join(str(error).split())[:300]
    later = f"{folder} is complete; `hf upload {name} {folder}` sends it"
    kinds = {kind.__name__ for cause in causes(error) for kind in type(cause).__mro__}
    if status in (401, 403) or "LocalTokenNotFoundError" in kinds:
        why = "you are not logged in, or may not" if status != 403 else "you may not"
        return ConfigError(
            f"cannot push to {name} at {endpoint}: {why} write there",
            f"`hf auth login` (or set HF_TOKEN) with a token that may; {later}",
        )
    if "OfflineModeIsEnabled" in kinds:
        return ConfigError(f"cannot push to {name}: HF_HUB_OFFLINE forbids the network", later)
    if status or any(map(of_network, causes(error))) or isinstance(error, OSError | ValueError):
        said = f"HTTP status {status}" if status else text
        return StorageError(f"cannot push to {name} at {endpoint}: {said}", later)
    return error
