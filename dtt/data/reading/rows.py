"""From rows to texts: a field, or a template of several."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from typing import Any

from dtt.config.sources import Records
from dtt.data.reading.faults import Faults, Place
from dtt.errors import DataError

MISSING = object()


class RowTexts:
    """Makes a row's text, or counts why it has none."""

    def __init__(self, settings: Records, faults: Faults) -> None:
        self.faults = faults
        template = "{" + settings.field + "}" if settings.template is None else settings.template
        self._parts = [(text, name) for text, name, _, _ in string.Formatter().parse(template)]
        if settings.template is None:  # a field's name may have any characters
            self._parts = [("", settings.field)]
        self.names = [name for _, name in self._parts if name is not None]
        """The fields, dots included."""
        self.single = settings.field if settings.template is None else None
        """The field that is the text as it is; None with a template."""

    def text(self, row: Any, place: Place, has: Sequence[str] = ()) -> str | None:
        """Return the text of a row, None where it is left out.

        `place` names file and row, `has` the fields where the row does not have them all.
        """
        if not isinstance(row, Mapping):
            kind = type(row).__name__
            self.faults.leave_out(
                "rows that are not objects",
                lambda: DataError(
                    f"{place()}: a row is to be an object with fields, not {kind}",
                    "mend the row, or set data.source.on_bad to skip",
                ),
            )
            return None
        made = []
        for literal, name in self._parts:
            made.append(literal)
            if name is not None:
                value = self._value(row, name, place, has)
                if value is None:
                    return None
                made.append(value)
        text = "".join(made)
        return self.faults.characters(text, place)

    def _value(
        self, row: Mapping[str, Any], name: str, place: Place, has: Sequence[str]
    ) -> str | None:
        value = field_of(row, name)
        if isinstance(value, str):
            return value
        if value is MISSING or value is None:
            fields = ", ".join(map(str, has or row)) or "none"
            reason, problem = f"rows without {name}", f"no field {name} (fields: {fields})"
            if value is None:
                problem = f"{name} is null"
        else:
            kind = type(value).__name__
            reason, problem = f"rows whose {name} is not text", f"{name} is {kind}, not text"

        def error() -> DataError:
            fix = "name another data.source.field, or set data.source.on_bad to skip"
            return DataError(f"{place()}: {problem}", fix)

        if value is MISSING or value is None:
            if self.single is not None:  # nothing would be left of the row
                self.faults.leave_out(reason, error)
                return None
            return "" if self.faults.repair(reason, error) else None
        if not self.faults.repair(reason, error):
            return None
        return json.dumps(value, ensure_ascii=False, default=str)


def field_of(row: Mapping[str, Any], name: str) -> Any:
    """Return a field; where there is none of this name, dots enter nested ones; else MISSING."""
    if name in row:
        return row[name]
    head, dot, rest = name.partition(".")
    while dot:
        if isinstance(row.get(head), Mapping):
            return field_of(row[head], rest)
        more, dot, rest = rest.partition(".")
        head = f"{head}.{more}"
    return MISSING
