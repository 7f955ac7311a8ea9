"""Training.

The package can be called like the function `dtt.train.launch.train`: importing a subpackage makes
it an attribute of its parent, so `from dtt import train` finds the package.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtt.train.launch import Trained


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Trained:
        from dtt.train.launch import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
