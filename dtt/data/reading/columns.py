"""Rows of Parquet and Arrow files, a batch at a time: never a whole file in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from dtt.data.reading.compression import DamagedError
from dtt.data.reading.files import File, is_remote, not_permitted, open_file, shown
from dtt.errors import ConfigError, DataError

BATCH_BYTES = 4 << 20
"""Rows are taken from a Parquet file so many bytes at a time, about."""
TEXTS = {"string", "large_string", "string_view", "binary", "large_binary", "binary_view"}
FIX = "get the file again, or set data.source.on_bad to skip to leave out what cannot be read"


class Table(Protocol):
    """A file of rows with named columns."""

    names: list[str]
    """The columns."""
    rows: int
    groups: list[int]
    """Row numbers at which reading can begin at little cost, with 0 and `rows`."""
    size: int
    """Bytes of the rows when they are not compressed, about."""

    def batches(self, start: int, stop: int, names: list[str]) -> Iterator[tuple[int, Any]]:
        """Yield rows [start, stop) as (number of the first, record batch with these columns)."""


@contextmanager
def open_table(file: File, kind: str) -> Iterator[Table]:
    """Open a "parquet" or "arrow" file; DamagedError if it is none, or where it breaks off."""
    try:
        import pyarrow
    except ImportError:
        raise ConfigError(
            f"{shown(file.name)} needs the package pyarrow", "pip install 'dtt[data]'"
        ) from None
    with ExitStack() as opened:
        try:
            make = _ParquetTable if kind == "parquet" else _ArrowTable
            yield make(file, opened)
        except PermissionError as error:
            raise not_permitted(file.name, error) from None
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DamagedError(
                f"{shown(file.name)}: not a whole {kind} file: {reason}", FIX
            ) from None


class _ParquetTable:
    def __init__(self, file: File, opened: ExitStack) -> None:
        from pyarrow import parquet

        source: Any = file.name
        if is_remote(file.name):
            source = opened.enter_context(open_file(file))
        # Without a buffer a row group's whole column is fetched before its first row.
        self._file = parquet.ParquetFile(
            source, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        )
        opened.callback(self._file.close)
        self.names = list(self._file.schema_arrow.names)
        meta = self._file.metadata
        counts = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self.groups = [0]
        for count in counts:
            self.groups.append(self.groups[-1] + count)
        self.rows, self._meta = self.groups[-1], meta
        self.size = sum(meta.row_group(i).total_byte_size for i in range(len(counts)))

    def batches(self, start: int, stop: int, names: list[str]) -> Iterator[tuple[int, Any]]:
        columns = [name for name in self.names if _is_asked(name, names)]
        for index, (low, high) in enumerate(zip(self.groups, self.groups[1:], strict=False)):
            if high <= start or low >= stop or low == high:
                continue
            count = high - low
            size = self._meta.row_group(index).total_byte_size
            rows = max(1, min(1024, BATCH_BYTES * count // max(size, 1)))
            at = low
            for batch in self._file.iter_batches(rows, [index], columns, use_threads=False):
                first, last = max(start - at, 0), min(stop - at, batch.num_rows)
                if first < last:
                    yield at + first, batch.slice(first, last - first)
                at += batch.num_rows


class _ArrowTable:
    """An Arrow stream, which Hugging Face `datasets` writes, or an Arrow (Feather) file."""

    def __init__(self, file: File, opened: ExitStack) -> None:
        import pyarrow

        if is_remote(file.name):
            source = opened.enter_context(pyarrow.PythonFile(open_file(file), "r"))
        else:
            source = opened.enter_context(pyarrow.memory_map(file.name))
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        self._source, self._is_file = source, is_file
        self.groups, self.names = [0], []
        for batch in self._batches():
            self.names = list(batch.schema.names)
            self.groups.append(self.groups[-1] + batch.num_rows)
        self.rows, self.size = self.groups[-1], file.size

    def _batches(self) -> Iterator[Any]:
        from pyarrow import ipc

        self._source.seek(0)
        if self._is_file:
            reader = ipc.open_file(self._source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from ipc.open_stream(self._source)

    def batches(self, start: int, stop: int, names: list[str]) -> Iterator[tuple[int, Any]]:
        at = 0
        for batch in self._batches():
            first, last = max(start - at, 0), min(stop - at, batch.num_rows)
            if first < last:
                asked = [name for name in batch.schema.names if _is_asked(name, names)]
                yield at + first, batch.select(asked).slice(first, last - first)
            at += batch.num_rows
            if at >= stop:
                return


def rows_of(batch: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a record batch; text as a view of its bytes, which may not be UTF-8."""
    import pyarrow

    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if str(column.type) in TEXTS:
            column = column.cast(pyarrow.large_binary())
        columns[name] = column
    for index in range(batch.num_rows):
        yield {name: _value(column[index]) for name, column in columns.items()}


def _value(scalar: Any) -> Any:
    if scalar.is_valid and str(scalar.type) == "large_binary":
        return memoryview(scalar.as_buffer())
    return scalar.as_py()


def _is_asked(column: str, names: list[str]) -> bool:
    return any(name == column or name.startswith(f"{column}.") for name in names)


def data_set_files(folder: Path) -> list[str] | None:
    """Return the Arrow files of a data set that `datasets` saved to `folder`, in its order.

    None: the folder is none. DataError: it holds several splits, or its list of files is damaged.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise DataError(
            f"{folder} is a data set with the splits {', '.join(splits)}",
            f"choose one: data.source.path {folder / (splits or ['SPLIT'])[0]}",
        )
    state = folder / "state.json"
    if not state.is_file():
        return None
    try:
        rows = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        names = [Path(row["filename"]) for row in rows]
        if any(name.name != str(name) for name in names):  # no way out of the folder
            raise ValueError
        return [str(folder / name) for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{state}: not the state of a saved data set", "save it again") from None
