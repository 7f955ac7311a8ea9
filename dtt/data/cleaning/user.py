"""A user's own step."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtt.config.cleaning import UserFunction
from dtt.data.cleaning.step import Dropped
from dtt.errors import DataError


class UserStep:
    """Calls `module:function` with each text; it returns a text, or None to leave it out.

    It must be a pure function: the same text, the same answer. Whatever it raises is a DataError
    that names it.
    """

    def __init__(self, settings: UserFunction) -> None:
        self.settings = settings
        self.function, self.file = _load(settings.function)

    def __reduce__(self) -> tuple[Any, ...]:
        return UserStep, (self.settings,)  # other processes import it themselves

    def fingerprint(self) -> str:
        """The function's file; of what it imports, only `version` tells."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    def __call__(self, text: str) -> str | Dropped:
        name = self.settings.function
        try:
            result = self.function(text)
        except (Exception, SystemExit) as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise DataError(
                f"data.cleaning: {name} failed with {what}, on a text that begins {text[:60]!r}",
                "mend the function, or let it return None for such a text",
            ) from error
        if result is None:
            return Dropped("by the function")
        if not isinstance(result, str):
            raise DataError(
                f"data.cleaning: {name} returned {type(result).__name__}",
                "let it return a text, or None to leave the document out",
            )
        try:
            result.isascii() or result.encode()
        except UnicodeEncodeError as error:
            half = ascii(result[error.start])
            raise DataError(
                f"data.cleaning: {name} returned half a UTF-16 pair ({half} at character "
                f"{error.start:,}), on a text that begins {text[:60]!r}",
                "let it return text that UTF-8 can have, or None to leave the document out",
            ) from None
        return result


def _load(name: str) -> tuple[Callable[[str], Any], Path]:
    module_name, _, function_name = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # behind what is installed: a file here hides nothing
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise DataError(
            f"data.cleaning: {name}: no module named {error.name}",
            f"install it, or start dtt in the folder that holds {module_name.split('.')[0]}.py",
        ) from None
    except (Exception, SystemExit) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(
            f"data.cleaning: {name}: importing {module_name} failed with {what}",
            "mend the module",
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise DataError(
            f"data.cleaning: {name}: {module_name} has no function {function_name}",
            "check its name",
        )
    return function, Path(str(module.__file__))
