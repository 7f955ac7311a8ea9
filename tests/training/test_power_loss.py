"""Power loss at every moment of a save, in a model of the disk.

Every operation on files is recorded. For each prefix of the record, disks are made on which what
was not synced is lost, kept, zeroed, cut in half or reordered; each must hold the old state or
the new one, and the new one from the moment on when the call that wrote it has returned.
The model: a folder's changes are atomic one by one, and last only when the folder was synced; a
file's bytes only when the file was synced.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from toy_run import assert_whole, checkpoints_in, store

from dtt import storage
from dtt.errors import DttError

Operation = tuple[Any, ...]


@dataclass
class File:
    data: bytes = b""
    synced: bytes = b""


@dataclass
class Folder:
    entries: dict[str, Any] = field(default_factory=dict)
    synced: dict[str, Any] = field(default_factory=dict)
    pending: list[Operation] = field(default_factory=list)

    def change(self, operation: Operation) -> None:
        self.pending.append(operation)
        perform(self.entries, operation)


def perform(entries: dict[str, Any], operation: Operation) -> None:
    kind, name, other = operation
    if kind == "add":
        entries[name] = other
    elif kind == "remove":
        entries.pop(name, None)
    elif name in entries:
        entries[other] = entries.pop(name)


class Disk:
    """The run folder as the kernel sees it, and what of it is on the platter."""

    def __init__(self) -> None:
        self.root = Folder()

    def at(self, path: tuple[str, ...]) -> Any:
        node: Any = self.root
        for part in path:
            node = node.entries[part]
        return node

    def apply(self, kind: str, path: tuple[str, ...], *rest: Any) -> None:
        if kind == "write":
            self.at(path).data += rest[0]
        elif kind == "sync":
            node = self.at(path)
            if isinstance(node, File):
                node.synced = node.data
            else:
                node.synced, node.pending = dict(node.entries), []
        else:
            parent, name = self.at(path[:-1]), path[-1]
            if kind in ("create", "mkdir"):
                parent.change(("add", name, File() if kind == "create" else Folder()))
            elif kind == "rename":
                parent.change(("rename", name, rest[0][-1]))
            else:
                parent.change(("remove", name, None))

    def image(
        self,
        survives: Callable[[], bool],
        content: Callable[[File], bytes],
        folder: Folder | None = None,
    ) -> Iterator[tuple[str, bytes | None]]:
        """Yield (path, bytes; None for a folder) as found after the power is back."""
        folder = folder or self.root
        entries = dict(folder.synced)
        for operation in folder.pending:
            if survives():
                perform(entries, operation)
        for name, node in sorted(entries.items()):
            if isinstance(node, File):
                yield name, content(node)
            else:
                yield name, None
                for path, data in self.image(survives, content, node):
                    yield f"{name}/{path}", data


CONTENTS: list[Callable[[File], bytes]] = [
    lambda file: file.synced,
    lambda file: file.data,
    lambda file: file.synced + bytes(len(file.data) - len(file.synced)),
    lambda file: file.data[: max(len(file.synced), len(file.data) // 2)],
]


def images(log: list[Operation]) -> Iterator[tuple[list[Any], tuple[Any, ...]]]:
    """Yield each different disk after each prefix of `log`, with the marks passed by then."""
    disk, passed, seen = Disk(), [], set()
    chance = random.Random(0)
    subsets = [lambda: False, lambda: True, lambda: chance.random() < 0.5]
    for operation in log:
        if operation[0] == "mark":
            passed.append(operation[1])
        else:
            disk.apply(*operation)
        for survives in subsets:
            for content in CONTENTS:
                image = tuple(disk.image(survives, content))
                if (len(passed), image) not in seen:
                    seen.add((len(passed), image))
                    yield passed, image


def record(monkeypatch: pytest.MonkeyPatch, run: Path, work: Callable[[Any], None]) -> list[Any]:
    """Return the operations below `run` that `work` performs; it may put marks between them."""
    log: list[Operation] = []
    handles: dict[int, tuple[str, ...]] = {}
    really = {name: getattr(os, name) for name in ("open", "write", "fsync")}

    def parts(path: Any) -> tuple[str, ...]:
        return Path(path).relative_to(run).parts

    def opened(path: Any, flags: int, mode: int = 0o777) -> int:
        handle: int = really["open"](path, flags, mode)
        handles[handle] = parts(path)
        if flags & os.O_CREAT:
            log.append(("create", parts(path)))
        return handle

    def written(handle: int, data: memoryview) -> int:
        log.append(("write", handles[handle], bytes(data)))
        return int(really["write"](handle, data))

    def synced(handle: int) -> None:
        log.append(("sync", handles[handle]))

    with monkeypatch.context() as patch:
        for name, function in (("open", opened), ("write", written), ("fsync", synced)):
            patch.setattr(os, name, function)
        for name, kind in (("mkdir", "mkdir"), ("unlink", "remove"), ("rmdir", "remove")):
            watch(patch, log, name, kind, parts)
        watch(patch, log, "replace", "rename", parts)
        work(lambda mark: log.append(("mark", mark)))
    return log


def watch(patch: Any, log: list[Any], name: str, kind: str, parts: Callable[[Any], Any]) -> None:
    really = getattr(Path, name)

    def call(path: Path, *arguments: Any, **options: Any) -> Any:
        result = really(path, *arguments, **options)
        log.append((kind, parts(path), *map(parts, arguments)))
        return result

    patch.setattr(Path, name, call)


def scenario(run: Path) -> Callable[[Any], None]:
    """First save, second, the second once more, a third with retention; and a plain file twice."""

    def work(mark: Callable[[Any], None]) -> None:
        for text in ("old", "new"):
            storage.write_atomic(run / "config.yaml", text)
            mark(text)
        made = checkpoints_in(run, keep=2)
        for step in (2, 4, 4, 6):
            store(made, step, best_loss=1.0 / step)
            mark(step)
        assert not made.warnings

    return work


def check(run: Path, passed: list[Any], image: tuple[Any, ...]) -> None:
    run.mkdir()
    for path, data in image:
        if data is None:
            (run / path).mkdir()
        else:
            (run / path).write_bytes(data)
    made = checkpoints_in(run)
    found = made.newest()
    assert not made.warnings
    steps = [mark for mark in passed if isinstance(mark, int)]
    if found is not None:
        assert_whole(found, found.step)
    next_step = {0: 2, 1: 4, 2: 4}.get(len(steps), 6)
    assert (found.step if found else None) in {steps[-1] if steps else None, next_step}
    config = (run / "config.yaml").read_text() if (run / "config.yaml").exists() else None
    assert config in {"new", "old" if "new" not in passed else "new", None if not passed else "new"}


def test_every_prefix_leaves_the_old_state_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    log = record(monkeypatch, tmp_path / "run", scenario(tmp_path / "run"))
    assert sum(operation[0] == "sync" for operation in log) > 40
    count = 0
    for passed, image in images(log):
        count += 1
        check(tmp_path / str(count), passed, image)
    assert count > 300


@pytest.mark.parametrize("forgotten", ["files", "folders"])
def test_the_model_notices_a_forgotten_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    (tmp_path / "run").mkdir()
    log = record(monkeypatch, tmp_path / "run", scenario(tmp_path / "run"))
    files = {operation[1] for operation in log if operation[0] == "create"}
    kept = [
        operation
        for operation in log
        if operation[0] != "sync" or (operation[1] in files) != (forgotten == "files")
    ]
    with pytest.raises((AssertionError, DttError)):
        for count, (passed, image) in enumerate(images(kept)):
            check(tmp_path / str(count), passed, image)
