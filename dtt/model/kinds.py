"""The model that settings ask for."""

from __future__ import annotations

import torch

from dtt.config.model import AnyModel, Model
from dtt.model.decoder import Decoder
from dtt.model.language_model import LanguageModel


def empty_model(settings: AnyModel) -> LanguageModel:
    """Return the model of complete settings on the meta device: without memory."""
    if isinstance(settings, Model):
        with torch.device("meta"):
            return Decoder(settings)
    from dtt.model.hf.model import HfCausalModel  # transformers is for those who use it

    return HfCausalModel(settings)
