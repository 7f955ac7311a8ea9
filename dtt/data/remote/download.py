"""`dtt download`: say what it takes, bring it here, or write a source's documents as one text."""

from __future__ import annotations

import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from dtt import storage
from dtt.config.remote import Hub, Url
from dtt.config.schema import Config
from dtt.config.sources import source_label
from dtt.data.remote.hub import Selection
from dtt.data.remote.partial import RemoteFile, beside
from dtt.data.remote.reader import RemoteReader, download, measured, sample, samples, select
from dtt.data.remote.retries import note
from dtt.data.remote.transfer import size_text, time_text
from dtt.data.sources import SourceReader, open_source
from dtt.errors import EXIT_DONE, EXIT_PREEMPTED, ConfigError, StorageError

SEPARATOR = "\n<|endoftext|>\n"
"""Between documents: no story has it, and it is rare enough elsewhere to look at."""


def download_command(
    config: Config,
    *,
    output: Path | None,
    dry_run: bool = False,
    update: bool = False,
    verify: bool = False,
) -> int:
    """Bring the corpora of a configuration here and return the exit code.

    A plan comes first (with `dry_run` only that). Finished downloads are left alone: `update`
    asks the Hub for a newer revision, `verify` reads every file again. Sources that are on this
    machine anyway, and all others with `output`, are written as one text file (default:
    <data.dir>/<name of the corpus>.txt).
    """
    folder = config.data.dir / "downloads"
    settings = [part.source for part in config.data.mixture] or [config.data.source]
    if config.data.mixture and output is not None:
        raise ConfigError(
            "--output writes one corpus as text, and this is a mixture", "name one with -d"
        )
    remote = [source for source in settings if isinstance(source, Hub | Url)]
    before = signal.signal(signal.SIGTERM, _end)
    try:
        for source in remote:
            _download(source, folder, dry_run, update, verify)
        if not remote and (dry_run or config.data.mixture):
            one = f"{source_label(config.data.source)} is"
            what = "all parts of the mixture are" if config.data.mixture else one
            print(f"nothing to download: {what} on this machine")
        elif not dry_run and (output or not remote):
            _write_text(config, output)
    finally:
        signal.signal(signal.SIGTERM, before)
    return EXIT_DONE


def _download(settings: Hub | Url, folder: Path, dry_run: bool, update: bool, verify: bool) -> None:
    selection = select(settings, folder, update=update)
    if verify:
        _remove_damaged(selection)
    selection = measured(selection, settings.offline)
    missing = _print_plan(settings, selection)
    if dry_run:
        return
    limit, fetcher = settings.max_documents, selection.fetcher
    if limit is None:
        download(settings, selection)
    else:
        RemoteReader(settings, folder, selection)
    if not missing:
        return
    if fetcher.brought and fetcher.begun is not None:
        seconds = time.perf_counter() - fetcher.begun
        speed = size_text(fetcher.brought / max(seconds, 1e-3))
        print(f"  {size_text(fetcher.brought)} came in {time_text(seconds)} ({speed}/s)")
    elif fetcher.begun is None and limit is None:
        print("  another process brought it")
    if limit is not None:
        with sample(settings, selection).open("rb") as lines:
            count = sum(1 for _ in lines)
        few = f"{count:,} of the first {limit:,} documents are here: there are no more"
        print(f"  {few}" if count < limit else f"  the first {limit:,} documents are here")


def _print_plan(settings: Hub | Url, selection: Selection) -> bool:
    """Print files, bytes and the space for them; return whether any are missing. StorageError
    when they do not fit."""
    files, limit = selection.files, settings.max_documents
    missing = [file for file in files if file.record() is None]
    wanted = sum(max(0, (file.said or 0) - _arrived(file)) for file in missing)
    more = " or more" if any(file.said is None for file in files) else ""
    some = "" if limit is None else f"the first {limit:,} documents of "
    total = size_text(sum(file.said or 0 for file in files))
    print(f"{selection.name}: {some}{_count(len(files))}, {total}{more}")
    home = selection.lock.parent
    if not missing or (limit and max(samples(settings, selection), default=0) >= limit):
        print(f"  all here, in {home}")
        return False
    rest, part = len(files) - len(missing), sum(map(_arrived, missing))
    if rest or part:
        unfinished = f" and {size_text(part)} of unfinished ones" if part else ""
        print(f"  here already: {_count(rest)}{unfinished}")
    free = shutil.disk_usage(next(path for path in (home, *home.parents) if path.is_dir())).free
    most = f"{size_text(wanted)}{more}" if limit is None or more else f"at most {size_text(wanted)}"
    print(f"  {most} into {home}, where {size_text(free)} are free", flush=True)
    if limit is None and wanted > free:
        raise StorageError(
            f"{selection.name} needs {size_text(wanted)}, and {home} has {size_text(free)} free",
            "free some space, choose another --data.dir, or set --max-bytes",
        )
    return True


def _arrived(file: RemoteFile) -> int:
    """Bytes of a file that are here, whether it is whole or not."""
    paths = (file.path, beside(file.path, "part"))
    return next((path.stat().st_size for path in paths if path.is_file()), 0)


def _count(files: int) -> str:
    return f"{files:,} file" if files == 1 else f"{files:,} files"


def _remove_damaged(selection: Selection) -> None:
    """Read every finished file again, and remove those that are not what was recorded."""
    for file in selection.files:
        record = file.record()
        if record is not None and storage.file_digest(file.path) != record.sha256:
            note(f"{file.path}: damaged since it was downloaded; it is downloaded again")
            storage.remove(file.path)
            storage.remove(beside(file.path, "json"))


def _write_text(config: Config, output: Path | None) -> None:
    settings = config.data.source
    source = open_source(settings, config.data.dir)
    label = re.sub(r"[^\w.-]+", "-", source_label(settings)).strip("-.") or settings.name
    path = output or config.data.dir / f"{label}.txt"
    if any(path.exists() and path.samefile(name) for name in _local_files(source)):
        raise ConfigError(
            f"{path} is a file of the corpus itself, and is not overwritten",
            "name another file with --output",
        )
    count = 0

    def chunks() -> Iterator[bytes]:
        nonlocal count
        between = b""
        for part in source.parts(0.0):
            for document in source.read(part):
                yield between + document.text.encode()
                between = SEPARATOR.encode() if document.ends else b""
                count += document.ends

    storage.make_folder(path.parent)
    written = storage.write_stream_atomic(path, chunks())
    what = "1 document" if count == 1 else f"{count:,} documents"
    print(f"{path}: {what}, {written.size:,} bytes, sha256 {written.digest[:16]}")
    apart = f" --data.source.separator {SEPARATOR!r}" if count > 1 else ""
    print(f"  dtt train --data-path {path}{apart}")


def _local_files(source: SourceReader) -> Iterator[Path]:
    """The files on this disk that a source of text or rows reads."""
    for file in getattr(source, "files", ()):
        path = file.path if isinstance(file, RemoteFile) else Path(getattr(file, "name", ""))
        if path.is_file():
            yield path


def _end(number: int, frame: object) -> None:
    """SIGTERM: what has arrived stays, and the same command goes on with it."""
    print("dtt download: stopped; the same command goes on where it is", file=sys.stderr)
    raise SystemExit(EXIT_PREEMPTED)
