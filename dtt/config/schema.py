"""Every setting of dtt: one frozen tree, strict, with the unit of each number beside it.

The docstring under a field is its help text, its line in docs/configuration.md and its
description in the JSON schema. Adding a setting = adding a field here and reading it somewhere
(a test fails if nothing does). This module imports neither torch nor anything else of dtt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dtt.config.data import Bpe, Data, Tokenizer
from dtt.config.model import HfModel, Model
from dtt.config.optim import Muon, Optimizer, Schedule
from dtt.config.parallel import Parallel
from dtt.config.section import Section


class Training(Section):
    """The loop."""

    engine: Literal["dtt", "lightning"] = "dtt"
    """What runs the loop: dtt's own, or the Trainer of Lightning (needs dtt[lightning])."""
    max_steps: int | None = Field(None, gt=0)
    """Optimizer steps; null: as `epochs` says, or 900."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training text; with max_steps, the run ends at whichever comes first."""
    batch_size: int = Field(8, gt=0)
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Sequences per rank per forward; null: as many as the accumulation asks for."""
    accumulation: int | None = Field(None, gt=0)
    """Forwards per optimizer step on each rank; null: batch_size / (micro_batch_size x ranks), and
    without that 1, or in a pipeline twice its ranks where the batch allows."""
    grad_clip: float | None = Field(1.0, gt=0)
    """Largest gradient norm; null: no clipping."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of forward and backward; auto: bf16 where the machine computes it natively."""
    compile: bool = False
    """torch.compile each block (tens of seconds at the start; needs a C++ compiler on CPUs)."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass instead of keeping their activations."""
    recompute: Literal["full", "selective"] = "full"
    """With gradient_checkpointing: all of a block, or only what is cheap (no products, no
    attention)."""
    recompute_every: int = Field(1, gt=0)
    """With gradient_checkpointing: one block of so many is recomputed."""
    fp8: bool = False
    """Multiply the matrices of blocks in fp8 (needs a GPU of compute capability 8.9 or more)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: cuda, then mps, then cpu."""
    threads: int | None = Field(None, gt=0)
    """CPU threads per rank; null: the machine's cores divided among the ranks on it."""


class Evaluation(Section):
    """Validation during training."""

    every: int = Field(600, ge=0)
    """Optimizer steps between validations; 0: only at the end."""
    max_tokens: int | None = Field(None, gt=0)
    """Use at most this many tokens of the split; null: the whole split."""
    batch_size: int | None = Field(None, gt=0)
    """Sequences per forward; null: as in training (a pipeline takes those of its step)."""


class Sample(Section):
    """Texts written during training, to see that it works."""

    every: int = Field(0, ge=0)
    """Optimizer steps between samples; 0: only at the end."""
    prompts: tuple[str, ...] = ("Once upon a time",)
    """Beginnings to continue; an empty list: no samples."""
    max_length: int = Field(120, gt=0)
    """New tokens per sample."""
    temperature: float = Field(0.8, ge=0)
    """Sampling temperature; 0: the likeliest token."""
    top_k: int | None = Field(None, gt=0)
    """Sample among the k likeliest tokens."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Sample among the likeliest tokens that together have this probability."""


class Checkpoint(Section):
    """What is saved, and how long it is kept."""

    every: int = Field(600, ge=0)
    """Optimizer steps between checkpoints; 0: only at the end."""
    every_epochs: float | None = Field(None, gt=0)
    """Also save each time this many epochs are complete."""
    keep: int = Field(2, ge=1)
    """Checkpoints to keep beside the best one; older ones are removed."""
    background: bool = True
    """Write while training goes on (needs memory for one more copy of the state)."""


class Logging(Section):
    """What is shown and written while training."""

    every: int = Field(10, gt=0)
    """Optimizer steps between console lines (metrics.jsonl always has every step)."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """What goes to the console and to logs/train.log."""
    norms_every: int = Field(0, ge=0)
    """Optimizer steps between norms of each layer's gradients and weights in metrics.jsonl; 0:
    none."""
    resources: bool = False
    """CPU, memory, disk and network of this machine, and its GPUs' load, memory and power, in
    metrics.jsonl (needs dtt[monitor])."""
    tensorboard: bool = False
    """TensorBoard events in the run folder (needs dtt[tensorboard])."""
    wandb: bool = False
    """A W&B run, offline if its server is not there (needs dtt[wandb])."""
    trackers: tuple[str, ...] = ()
    """Other trackers: `mlflow` (needs dtt[mlflow]), or your own as module:function."""
    profile: bool = False
    """A profiler trace of `profile_steps` in the run folder, and what costs most."""
    profile_steps: str = Field("6-8", pattern=r"^[1-9]\d*(-[1-9]\d*)?$")
    """Which optimizer steps of this process are profiled, the first being 1: 6-8, or 20."""

    @model_validator(mode="after")
    def _steps_in_order(self) -> Logging:
        first, _, last = self.profile_steps.partition("-")
        if int(last or first) < int(first):
            raise ValueError(f"profile_steps ({self.profile_steps}) ends before it begins")
        return self


class Config(Section):
    """A complete run."""

    name: str | None = Field(None, min_length=1, pattern=r"^[^/\\\s.][^/\\\n\t]*$")
    """Name of the run; null: the last configuration file's, or the corpus's name."""
    dir: Path = Path("runs")
    """Folder that holds one folder per run."""
    seed: int = Field(1337, ge=0, lt=2**63)
    """Seed of the initial weights, the data order and dropout."""
    init_from: str | None = Field(None, min_length=1)
    """Start from a folder of Hugging Face, or ORG/NAME[@REVISION] of its Hub: from its weights,
    with the model that its config.json describes, and its tokenizer unless one is set."""
    init_ignore_code: bool = False
    """Start from `init_from` though the folder has code of its own; the code never runs."""
    model: Annotated[Model | HfModel, Field(discriminator="name")] = Model()
    """What is trained."""
    tokenizer: Tokenizer = Bpe()
    """How text becomes tokens."""
    data: Data = Data()
    """Where text comes from."""
    training: Training = Training()
    """The loop."""
    optimizer: Optimizer = Muon()
    """What turns gradients into updates."""
    schedule: Schedule = Schedule()
    """Learning rate over the run."""
    parallel: Parallel = Parallel()
    """How the ranks share the work."""
    evaluation: Evaluation = Evaluation()
    """Validation during training."""
    sample: Sample = Sample()
    """Texts written during training."""
    checkpoint: Checkpoint = Checkpoint()
    """What is saved."""
    logging: Logging = Logging()
    """What is shown."""

    @property
    def is_described_elsewhere(self) -> bool:
        """Whether the model follows from a folder, the Hub or `transformers`
        (dtt.huggingface.origin.with_origin)."""
        return self.init_from is not None or isinstance(self.model, HfModel)

    @model_validator(mode="before")
    @classmethod
    def _name_the_model(cls, data: Any) -> Any:
        # Files of older versions, and people who mean the decoder, do not say whose code it is.
        model = data.get("model") if isinstance(data, dict) else None
        if not isinstance(model, dict):
            return data
        from dtt.config.familiar import in_our_words
        from dtt.config.layers import Layer

        words = in_our_words(Layer({"model": model})).tree["model"]
        return {**data, "model": {"name": Model().name, **words}}

    @model_validator(mode="after")
    def _warmup_fits(self) -> Config:
        warmup, steps = self.schedule.warmup_steps, self.training.max_steps
        if warmup and steps and warmup > steps:
            raise ValueError(
                f"schedule.warmup_steps ({warmup}) is longer than the run "
                f"(training.max_steps {steps})"
            )
        return self
