"""Compressed files as streams: gzip, zstd, bzip2 and xz, in memory that does not grow."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from dtt.errors import ConfigError, DataError

READ = 1 << 16
"""Compressed bytes that are read at a time."""
XZ_MEMORY = 256 << 20
"""The most that an xz file may ask for, in bytes (xz -9 needs 65 MiB)."""


class DamagedError(DataError):
    """A file breaks off or holds other bytes than its format allows; `what` says where."""


class _Gzip:
    """zlib's decompressor of gzip members, with the methods that bz2's, lzma's and zstd's have."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(31)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


def inflate(opened: IO[bytes], ending: str, name: str, size: int) -> Iterator[bytes]:
    """Yield the contents in blocks of at most `size` bytes; `ending` (".gz", ...) is the format.

    A file may be several compressed ones after another. Raises DamagedError, which has its `name`,
    after all bytes that could be had, where it breaks off.
    """
    make, done = _decompressor(ending, name), 0
    decoder, begun = make(), False
    try:
        while data := opened.read(READ):
            if not begun:  # zeros may follow a compressed file, as tapes have them
                data = data.lstrip(b"\0")
            begun = begun or bool(data)
            while data or not (decoder.eof or decoder.needs_input):
                if block := decoder.decompress(data, size):
                    yield block
                    done += len(block)
                data = b""
                if decoder.eof and (data := decoder.unused_data.lstrip(b"\0")):
                    decoder = make()
            if decoder.eof:  # at the end of the file, or of one that another follows
                decoder, begun = make(), False
    except DataError:
        raise
    except Exception as error:  # zlib.error, lzma.LZMAError, zstd.ZstdError, OSError of bz2
        raise _damaged(ending, name, done, str(error)) from None
    if begun:
        raise _damaged(ending, name, done, "it breaks off")


def _decompressor(ending: str, name: str) -> Callable[[], Any]:
    match ending:
        case ".gz":
            return _Gzip
        case ".bz2":
            import bz2

            return bz2.BZ2Decompressor
        case ".xz":
            import lzma

            return lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY)
    try:
        import compression.zstd as zstd  # type: ignore[import-not-found,unused-ignore]
    except ImportError:  # before Python 3.14
        try:
            from backports import zstd
        except ImportError:
            raise ConfigError(
                f"{name} needs the package backports.zstd", "pip install 'dtt[data]'"
            ) from None
    decompressor: Callable[[], Any] = zstd.ZstdDecompressor
    return decompressor


def _damaged(ending: str, name: str, done: int, reason: str) -> DamagedError:
    return DamagedError(
        f"{name}: damaged {ending.lstrip('.')} file: {reason} after {done:,} bytes of its contents",
        "get the file again, or set data.source.on_bad to skip to use what comes before",
    )
