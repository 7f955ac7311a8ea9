"""Settings of optimizers and learning-rate schedules."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dtt.config.section import Section


class AdamW(Section):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017)."""

    name: Literal["adamw"] = "adamw"
    """Which optimizer."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay, on matrices only."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    """Decay of the two moments."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""


class Adam(AdamW):
    """Adam (Kingma and Ba 2014); its weight decay is added to the gradient."""

    name: Literal["adam"] = "adam"  # type: ignore[assignment]
    """Which optimizer."""
    weight_decay: float = Field(0.0, ge=0)
    """L2 penalty, on matrices only."""


class Sgd(Section):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    """Which optimizer."""
    lr: float = Field(0.1, gt=0)
    """Peak learning rate."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = Field(0.0, ge=0)
    """L2 penalty, on matrices only."""


class Muon(Section):
    """Muon on the matrices inside the blocks (Jordan et al. 2024), AdamW on everything else."""

    name: Literal["muon"] = "muon"
    """Which optimizer."""
    lr: float = Field(4e-3, gt=0)
    """Peak learning rate, on AdamW's scale for both (updates are matched in RMS to AdamW's)."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay, on matrices only."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Nesterov momentum of Muon."""
    ns_steps: int = Field(5, ge=1)
    """Newton-Schulz iterations."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    """Decay of AdamW's two moments."""
    eps: float = Field(1e-8, gt=0)
    """AdamW: added to the root of the second moment."""


Optimizer = Annotated[Muon | AdamW | Adam | Sgd, Field(discriminator="name")]


class Schedule(Section):
    """Learning rate over the run: a linear warm-up, then one of six shapes."""

    name: Literal["cosine", "linear", "wsd", "constant", "exponential", "onecycle"] = "cosine"
    """Shape after the warm-up; wsd: hold, then decay; onecycle: cosines up and down."""
    warmup_steps: int | None = Field(None, ge=0)
    """Optimizer steps of warm-up; null: a tenth of the run, 100 at most."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Last learning rate / peak."""
    decay_fraction: float = Field(0.3, gt=0, le=1)
    """wsd: share of the run that decays."""

    @model_validator(mode="after")
    def _exponential_ends_above_zero(self) -> Schedule:
        if self.name == "exponential" and self.min_lr_ratio == 0:
            raise ValueError("an exponential never reaches min_lr_ratio 0: set it above 0")
        return self
