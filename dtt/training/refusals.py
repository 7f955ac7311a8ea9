"""What a device, a layout or a model cannot do, said before anything is trained."""

from __future__ import annotations

import torch

from dtt.config.model import HfModel
from dtt.config.schema import Config, Training
from dtt.data.loader import Loader
from dtt.errors import ConfigError
from dtt.model.fp8 import refuse_without_fp8
from dtt.model.language_model import LanguageModel
from dtt.parallel.layout import Layout, resolve
from dtt.training.engine import refuse_for_engine


def refuse_settings(
    config: Config, device: torch.device, layout: Layout, dtype: torch.dtype
) -> None:
    """Raise ConfigError for what this device or this layout cannot do."""
    training = config.training
    if isinstance(config.model, HfModel):
        _refuse_for_transformers(training)
    if training.compile and layout.pipeline > 1 and config.parallel.schedule == "zero-bubble":
        raise ConfigError(
            "training.compile does not go with parallel.schedule zero-bubble",
            "use another schedule, or leave compile off",
        )
    if training.compile and training.gradient_checkpointing and training.recompute == "selective":
        raise ConfigError(
            "training.recompute selective saves nothing in compiled blocks",
            "leave one of the two off: the compiler chooses what it keeps",
        )
    if not layout.is_plain and dtype == torch.float16:
        raise ConfigError(f"fp16 does not go with {layout}", "use bf16 or fp32")
    refuse_for_engine(training, layout, dtype)
    if config.training.fp8:
        refuse_without_fp8(device)
    if config.parallel.offload and config.optimizer.name == "muon" and device.type != "cpu":
        raise ConfigError(
            "parallel.offload has the optimizer work on the CPU, which is too slow for muon",
            "use optimizer.name adamw, or leave offload off",
        )


def require_plan(config: Config, ranks: int) -> None:
    """Raise ConfigError, with the arithmetic, if a model of `transformers` cannot be divided among
    so many ranks; its settings are complete (`dtt.huggingface.origin.with_origin`)."""
    layout = resolve(config.parallel, config.model, ranks)
    if isinstance(config.model, HfModel) and layout.tensor > 1:
        from dtt.parallel.plan import check_plan  # transformers is for those who use it

        check_plan(config.model, layout.tensor)


def _refuse_for_transformers(training: Training) -> None:
    """Raise ConfigError for what dtt does in its own decoder only."""
    wanted = {
        "training.fp8": training.fp8,
        "training.recompute selective": training.recompute == "selective",
        "training.recompute_every": training.recompute_every > 1,
    }
    for name in (name for name, on in wanted.items() if on):
        raise ConfigError(
            f"{name} is for dtt's own decoder, not for a model of transformers",
            "leave it out, or use model.name decoder",
        )


def refuse_documents(model: LanguageModel, loader: Loader) -> None:
    """Raise ConfigError if documents must not see each other, and the model cannot have it so."""
    if model.isolates is False and any(source.isolate is not None for source in loader.sources):
        raise model.cannot_isolate()
