"""The text of a JSON row that is too long to hold, read as a stream."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

ESCAPE = (
    r'\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\["\\/bfnrt]'
)
LONGEST_ESCAPE = 12
STRING = re.compile(rf'(?:[^"\\\x00-\x1f]+|{ESCAPE})+')
FIRST_OF_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")
SCALAR = re.compile(r'[^,:\[\]{}"\s]+')
SPACE = re.compile(r"[ \t\n\r]*")
LONGEST_NAME = 1 << 16


class BadRowError(ValueError):
    """A row is not JSON, or has not the field."""


class LongRow:
    """Scans a row that comes in chunks; memory is that of two chunks."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks = chunks
        self._data, self._at = "", 0

    def text_of(self, field: str) -> Iterator[str]:
        """Yield the text of a field of the row's object, in pieces; BadRowError if it has none."""
        self._expect("{")
        found, separator = False, self._next()
        while separator != "}":
            name = self._name()
            self._expect(":")
            if name == field and not found:
                found = True
                if self._next() != '"':
                    raise BadRowError(f"{field} is not text")
                yield from self._string()
            else:
                self._skip()
            separator = self._next()
            if separator == ",":
                self._at += 1
            elif separator != "}":
                raise BadRowError("not JSON")
        self._expect("}")
        if self._next():
            raise BadRowError("not JSON: more behind its end")
        if not found:
            raise BadRowError(f"has no {field}")

    def _more(self) -> bool:
        chunk = next(self._chunks, None)
        if chunk is None:
            return False
        self._data, self._at = self._data[self._at :] + chunk, 0
        return True

    def _next(self) -> str:
        """The next character that is no space, not taken; "" at the end."""
        while True:
            match = SPACE.match(self._data, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._data):
                return self._data[self._at]
            if not self._more():
                return ""

    def _expect(self, char: str) -> None:
        if self._next() != char:
            raise BadRowError("not JSON")
        self._at += 1

    def _name(self) -> str:
        name = ""
        for piece in self._string():
            name += piece
            if len(name) > LONGEST_NAME:
                raise BadRowError(f"a field's name has more than {LONGEST_NAME} characters")
        return name

    def _string(self) -> Iterator[str]:
        self._expect('"')
        while True:
            match = STRING.match(self._data, self._at)
            raw = match[0] if match else ""
            end = self._at + len(raw)
            ended = self._data[end : end + 1] == '"'
            if not ended and _ends_in_half_a_pair(raw):  # the other half may be in the next chunk
                raw = raw[:-6]
            if raw:
                yield json.loads(f'"{raw}"')
            self._at += len(raw)
            if ended:
                self._at += 1
                return
            stuck = not match and len(self._data) - self._at >= LONGEST_ESCAPE
            if stuck or not self._more():
                raise BadRowError("not JSON: a text does not end as it should")

    def _skip(self) -> None:
        """Pass over a value of any kind."""
        depth = 0
        while True:
            char = self._next()
            if char == '"':
                for _ in self._string():
                    pass
            elif char and char in "[{":
                depth += 1
                self._at += 1
            elif char and char in "]}" and depth:
                depth -= 1
                self._at += 1
            elif char and char in ",:" and depth:
                self._at += 1
                continue
            elif match := SCALAR.match(self._data, self._at):
                self._at = match.end()
                while self._at == len(self._data) and self._more():
                    match = SCALAR.match(self._data, self._at)
                    self._at = match.end() if match else self._at
            else:
                raise BadRowError("not JSON")
            if not depth:
                return


def _ends_in_half_a_pair(raw: str) -> bool:
    before = raw[:-6]
    # An odd number of backslashes before it would make the u a letter.
    escaped = (len(before) - len(before.rstrip("\\"))) % 2
    return bool(FIRST_OF_PAIR.fullmatch(raw[-6:])) and not escaped
