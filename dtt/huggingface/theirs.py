"""Runs whose model is one of `transformers` already: what their folder says, and its proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dtt.config.model import HfModel
from dtt.errors import CheckpointError
from dtt.huggingface.proof import TOLERANCE, drift, fixed_tokens, load_theirs
from dtt.model.hf.settings import config_of
from dtt.model.language_model import LanguageModel


def architecture_of(model: HfModel) -> str:
    """Return the class of `transformers` that a model is."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config_of(model))]
    return str(found.__name__)


def theirs_json(model: HfModel, end_of_text: int | None, dtype: str) -> dict[str, Any]:
    """Return config.json: the model's own settings, and the tokens that dtt's texts begin with."""
    config = config_of(model)
    data: dict[str, Any] = config.to_diff_dict()
    return data | {
        "architectures": [architecture_of(model)],
        "model_type": config.model_type,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": dtype,
    }


@torch.no_grad()
def prove_same(folder: Path, architecture: str, ours: LanguageModel) -> str:
    """Compare the folder, as `transformers` loads it, with the run's model, in fp32.

    Return what was found, in words; CheckpointError: logits differ by more than TOLERANCE of their
    range, or are not finite.
    """
    theirs, worst, length = load_theirs(folder, architecture), 0.0, 0
    for tokens in fixed_tokens(ours.settings):
        found = ours.hidden(tokens)
        logits = F.linear(found, ours.head_weight) if ours.head_is_plain else found
        difference, length = drift(theirs(tokens).logits, logits), tokens.shape[1]
        if not difference <= TOLERANCE:  # a NaN is no match
            raise CheckpointError(
                f"{folder}: the logits of transformers differ from those of the run by "
                f"{difference:.1e} of their range (at most {TOLERANCE:.0e} is rounding)",
                "please report it, with config.json",
            )
        worst = max(worst, difference)
    far = f"(fp32, up to {length:,} tokens)"
    if not worst:
        return f"transformers gives those of the run, bit for bit {far}"
    return f"those of transformers differ from dtt's by at most {worst:.0e} of their range {far}"
