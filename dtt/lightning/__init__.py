"""A run of dtt in Lightning's Trainer, your own or that of `dtt train --training.engine lightning`.

>>> from lightning import Trainer
>>> from dtt.lightning import DttData, DttModule
>>> Trainer(max_epochs=1).fit(DttModule(config), DttData(config))
"""

from __future__ import annotations

from dtt.errors import ConfigError

try:
    from dtt.lightning.data import DttData
    from dtt.lightning.module import DttModule
except ModuleNotFoundError as error:
    if error.name != "lightning":
        raise
    raise ConfigError(
        "dtt.lightning needs the package lightning, which is missing",
        "pip install 'dtt[lightning]'",
    ) from error

__all__ = ["DttData", "DttModule"]
