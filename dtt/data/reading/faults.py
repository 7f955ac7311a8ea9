"""Bad input: stop with a line that says where it is, or leave it out or repair it, and count it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from dtt.config.sources import OnBad
from dtt.errors import DataError

UNDECODABLE = "undecodable documents"
WITH_NUL = "documents with NUL"
WITH_SURROGATES = "documents with lone surrogates"

Place = Callable[[], str]
"""Names a file, and the row in it where that says more; asked only when it is to be said."""


class Faults:
    """What `on_bad` says, applied; `bad` counts by reason what was left out or repaired."""

    def __init__(self, on_bad: OnBad, bad: Counter[str]) -> None:
        self.on_bad, self.bad = on_bad, bad

    def leave_out(self, reason: str, error: Callable[[], DataError]) -> None:
        """Count what cannot be repaired; raises `error` instead where on_bad is error."""
        if self.on_bad == "error":
            raise error() from None
        self.bad[f"{reason}, left out"] += 1

    def repair(self, reason: str, error: Callable[[], DataError]) -> bool:
        """Whether to repair it, counted; else it is left out, as above."""
        if self.on_bad != "replace":
            self.leave_out(reason, error)
            return False
        self.bad[f"{reason}, repaired"] += 1
        return True

    def decode(self, raw: bytes, encoding: str, place: Place, offset: int) -> str | None:
        """Return the text of `raw`, or None where it is left out; U+FFFD replaces what is bad.

        `place` names the file, and `offset` is that of the first byte.
        """
        if b"\0" in raw:
            at = offset + raw.index(0)

            def binary() -> DataError:
                return DataError(
                    f"{place()}: a NUL byte at offset {at}: this is a binary file",
                    "give a text file (or say its data.source.encoding, such as utf-16), "
                    "or set data.source.on_bad to replace or skip",
                )

            if not self.repair(WITH_NUL, binary):
                return None
            raw = raw.replace(b"\0", "\N{REPLACEMENT CHARACTER}".encode(encoding, "replace"))
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError as error:
            start = error.start

        def undecodable() -> DataError:
            return DataError(
                f"{place()}: byte {offset + start} (0x{raw[start]:02x}) is not {encoding}",
                "name the right data.source.encoding, or set data.source.on_bad to replace or skip",
            )

        if not self.repair(UNDECODABLE, undecodable):
            return None
        return raw.decode(encoding, "replace")

    def characters(self, text: str, place: Place) -> str | None:
        """Return a text whose escapes were resolved: without NUL and halves of UTF-16 pairs."""
        if "\0" in text:
            if not self.repair(WITH_NUL, lambda: _unfit(place, "has the character NUL")):
                return None
            text = text.replace("\0", "\N{REPLACEMENT CHARACTER}")
        if not text.isascii() and not _is_unicode(text):
            if not self.repair(WITH_SURROGATES, lambda: _unfit(place, "has half a UTF-16 pair")):
                return None
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text


def _unfit(place: Place, what: str) -> DataError:
    return DataError(f"{place()}: the text {what}", "set data.source.on_bad to replace or skip")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
