"""The proof that a folder is the model: `transformers` and dtt give the same logits for it.

Both compute in fp32 on the CPU, on fixed tokens from all of the vocabulary. Where they differ,
the first part whose output drifts is named.

dtt's rotary positions are exact, and those of `transformers` have angles rounded to fp32: far out
in a text that is more than TOLERANCE in models with large weights. So the positions are compared
by themselves, each with the rounding that its angle may have. Where logits differ by more than
TOLERANCE, they are compared once more with the same angles in both, and the `Proof` says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtt.config.model import AnyModel, Rotary
from dtt.errors import CheckpointError, ConfigError
from dtt.huggingface.families import Family
from dtt.model.decoder import Decoder
from dtt.model.hf.quiet import quiet
from dtt.model.positions import frequencies, rotation_table

TOLERANCE = 1e-5
"""Largest difference of a logit, as a share of the range of all logits."""
ANGLE_ROUNDING = 1e-6
"""Share of an angle by which fp32 may round it: a few times 2^-24."""
SHORT, LONG = 64, 1024
"""Tokens of the sequences compared, as far as the context allows."""


def require_transformers(why: str, otherwise: str) -> None:
    """Raise ConfigError unless `transformers` is installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            f"{why} needs the Python package 'transformers'",
            f"pip install 'dtt[hf]'{', or ' * bool(otherwise)}{otherwise}",
        )


@dataclass(frozen=True)
class Proof:
    """What was found to be the same, and how far; as text it ends a sentence."""

    drift: float
    """Largest difference of a logit as a share of the range of all."""
    tokens: int
    """Of the longest text that was compared."""
    same_angles: bool
    """Whether rotary positions needed the angles of `transformers` in both models."""

    def __str__(self) -> str:
        how = "with the same rotary angles, " if self.same_angles else ""
        return f"{self.drift:.0e} of their range (fp32, {how}up to {self.tokens:,} tokens)"


def prove(folder: Path, family: Family, ours: Decoder) -> Proof:
    """Compare the model in `folder`, as `transformers` loads it, with our decoder, in fp32.

    CheckpointError: logits differ by more than TOLERANCE of their range, with the first part that
    drifts, or are not finite, or `transformers` cannot load the folder.
    """
    theirs = load_theirs(folder, family.architecture)
    angles, same_angles = _their_angles(folder, family, ours, theirs), False
    worst, length = 0.0, 0
    for tokens in fixed_tokens(ours.settings):
        with torch.no_grad():
            expected, found = ours(tokens), theirs(tokens).logits
            difference = drift(expected, found)
            if difference > TOLERANCE and angles is not None:
                same_angles = True
                ours.rotate_by(angles)
                expected = ours(tokens)
                difference = drift(expected, found)
        if not difference <= TOLERANCE:  # a NaN is no match
            place = first_drift(ours, theirs, family, tokens)
            if not bool(expected.isfinite().all()):
                raise CheckpointError(
                    f"{folder}: the logits are not finite, {place} is the first that is not",
                    "take another revision or checkpoint",
                )
            raise CheckpointError(
                f"{folder}: the logits of transformers differ from dtt's by {difference:.1e} of "
                f"their range (at most {TOLERANCE:.0e} is rounding): {place} is the first to drift",
                "please report it, with config.json",
            )
        worst, length = max(worst, difference), tokens.shape[1]
    return Proof(worst, length, same_angles)


def _their_angles(folder: Path, family: Family, ours: Decoder, theirs: Any) -> Tensor | None:
    """Return the cos and sin of `transformers`, which are ours but for rounding; None: no rotary
    positions. CheckpointError: they are others."""
    settings = ours.settings
    if family.rotary is None or not isinstance(settings.positions, Rotary):
        return None
    width = settings.head_dim or settings.dim // settings.heads
    length = min(LONG, settings.context)
    exact = rotation_table(settings.positions, width, length)
    places = torch.arange(length)[None]
    with torch.no_grad():
        found = theirs.get_submodule(family.rotary)(exact[0], places)
    table = torch.stack([part[0, :, : width // 2] for part in found])
    angles = torch.outer(torch.arange(length), frequencies(settings.positions, width)[0].float())
    close = (table - exact).abs() <= TOLERANCE / 10 + ANGLE_ROUNDING * angles
    off = ~close.all(0)  # a NaN is not close
    if bool(off.any()):
        place = int(off.any(-1).nonzero()[0])
        raise CheckpointError(
            f"{folder}: transformers rotates position {place} by other angles than dtt: the base "
            "or the scaling of rotary positions is not the same",
            "please report it, with config.json",
        )
    return table


def fixed_tokens(settings: AnyModel) -> Iterator[Tensor]:
    """Yield sequences [1, T]: one token, a short one, and a long one with ids from all of the
    vocabulary."""
    size, context = settings.vocab_size or 0, settings.context
    generator = torch.Generator().manual_seed(0)
    for length in sorted({1, min(SHORT, context), min(LONG, context)}):
        yield torch.randint(size, (1, length), generator=generator)


def drift(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference as a share of the range of what was expected."""
    span = float(expected.max() - expected.min())
    difference = float((expected - found).abs().max())
    return difference / span if span > 0 else difference


def load_theirs(folder: Path, architecture: str) -> Any:
    """Return the model of a folder as `transformers` loads it, in fp32; nothing is executed that is
    in the folder."""
    import transformers

    with quiet():
        try:
            kind = getattr(transformers, architecture)
            model, report = kind.from_pretrained(
                folder,
                config=kind.config_class.from_pretrained(folder),
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are told below
                output_loading_info=True,
            )
        except Exception as error:
            line = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"transformers {transformers.__version__} cannot load {folder}: {line}",
                "please report it, with config.json",
            ) from error
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(key):
            names = ", ".join(sorted(map(str, report[key]))[:3])
            raise CheckpointError(
                f"{folder}: transformers finds {key.replace('_', ' ')}: {names}",
                "please report it, with config.json",
            )
    return model.eval()


def first_drift(ours: Decoder, theirs: Any, family: Family, tokens: Tensor) -> str:
    """Return which part is the first whose output differs by more than TOLERANCE of its range."""
    found = {}
    with torch.no_grad():
        for side, model, places in (
            ("ours", ours, _our_parts(ours)),
            ("theirs", theirs, _their_parts(theirs, family, len(ours.blocks))),
        ):
            outputs: dict[str, Tensor] = {}
            hooks = [
                module.register_forward_hook(_keeping(outputs, name), always_call=False)
                if not enters
                else module.register_forward_pre_hook(_entering(outputs, name), with_kwargs=True)
                for name, module, enters in places
            ]
            model(tokens)
            for hook in hooks:
                hook.remove()
            found[side] = outputs
    for name, expected in found["ours"].items():
        difference = drift(expected, found["theirs"][name])
        if not difference <= TOLERANCE:
            return f"{name} ({difference:.1e})"
    return "the head"


Place = tuple[str, nn.Module, bool]
"""What it is called, the module, and whether what enters it is meant, not what leaves it."""


def _our_parts(ours: Decoder) -> list[Place]:
    places: list[Place] = [("the embedding", ours.blocks[0], True)]
    for index, block in enumerate(ours.blocks):
        places.append((f"block {index}, its attention", block.attention, False))  # type: ignore[arg-type]
        places.append((f"block {index}, its MLP", block.mlp, False))  # type: ignore[arg-type]
    assert ours.norm is not None
    return [*places, ("the final norm", ours.norm, False)]


def _their_parts(theirs: Any, family: Family, layers: int) -> list[Place]:
    first = theirs.get_submodule(family.blocks.replace("{n}", "0"))
    places: list[Place] = [("the embedding", first, True)]
    for index in range(layers):
        block = theirs.get_submodule(family.blocks.replace("{n}", str(index)))
        attention, mlp = block.get_submodule(family.attention), block.get_submodule(family.mlp)
        places.append((f"block {index}, its attention", attention, False))
        places.append((f"block {index}, its MLP", mlp, False))
    return [*places, ("the final norm", theirs.get_submodule(family.norm), False)]


def _keeping(outputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[name] = output[0] if isinstance(output, tuple) else output

    return keep


def _entering(outputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: Any, named: Any) -> None:
        outputs[name] = inputs[0] if inputs else named["hidden_states"]

    return keep
