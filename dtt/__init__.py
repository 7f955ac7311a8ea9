"""dtt: train language models, from raw text to a model of your own.

>>> from dtt import Config, train, load_run, generate
>>> trained = train(Config(name="demo"))
>>> print(generate(trained.folder, "Once upon a time")[0])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtt.version import __version__

if TYPE_CHECKING:
    from dtt.config.schema import Config
    from dtt.generation import generate
    from dtt.training.launch import train
    from dtt.training.load import load_run

__all__ = ["Config", "__version__", "generate", "load_run", "train"]

# Loaded when first asked for, so that `import dtt` (and `dtt --help`) does not import torch.
_HOMES = {
    "Config": "dtt.config.schema",
    "generate": "dtt.generation",
    "load_run": "dtt.training.load",
    "train": "dtt.training.launch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dtt' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
