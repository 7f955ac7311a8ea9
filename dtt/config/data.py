"""Settings of tokenizers and of how text is divided."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dtt.config.cleaning import Step
from dtt.config.section import Section
from dtt.config.sources import Source, Tales


class Char(Section):
    """One token per character that occurs in the training text."""

    name: Literal["char"] = "char"
    """Which tokenizer."""


class Byte(Section):
    """One token per byte: 256 tokens and the end of text."""

    name: Literal["byte"] = "byte"
    """Which tokenizer."""


class Bpe(Section):
    """A byte-level BPE trained on the training text (GPT-2's pre-tokenizer)."""

    name: Literal["bpe"] = "bpe"
    """Which tokenizer."""
    vocab_size: int = Field(1024, ge=257)
    """Number of tokens, the 256 bytes and the special tokens included."""
    special_tokens: Annotated[tuple[str, ...], Field(min_length=1)] = ("<|endoftext|>",)
    """Tokens that no text produces; the first one separates documents."""
    train_bytes: int | None = Field(None, gt=0, le=2_000_000_000)
    """Train on a seeded sample of at most this many bytes (the trainer counts in 31 bits); null:
    4,000 for each token of the vocabulary, and at most 100,000,000."""


class TokenizerFile(Section):
    """Any Hugging Face tokenizer.json."""

    name: Literal["file"] = "file"
    """Which tokenizer."""
    path: Path
    """A tokenizer.json, or a folder that holds one."""
    end_of_text: str | None = None
    """Token that separates documents; null: the first known one that the tokenizer has."""


Tokenizer = Annotated[Char | Byte | Bpe | TokenizerFile, Field(discriminator="name")]


class Ingredient(Section):
    """One corpus of a mixture."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """What it is called where its own figures are shown."""
    source: Source
    """Its corpus."""
    weight: float | None = Field(None, gt=0)
    """Its share of the training tokens, in proportion to the others'; null: by its size."""
    max_epochs: float | None = Field(None, gt=0)
    """See it at most so often; then the others share its part. null: without end."""
    cleaning: tuple[Step, ...] | None = None
    """Steps of cleaning for it alone; null: those of `data.cleaning`."""


class Data(Section):
    """Where text comes from, and how it is divided."""

    source: Source = Tales()
    """The corpus."""
    mixture: tuple[Ingredient, ...] = ()
    """Several corpora instead of `source`, each prepared apart, with one tokenizer for all."""
    temperature: float = Field(1.0, gt=0)
    """Weights that are null are a corpus's tokens ^ (1 / temperature): above 1 is more even."""
    packing: Literal["auto", "contiguous", "best-fit"] = "auto"
    """How windows are cut: one after another through the text, or packed with whole documents, the
    rest padded; auto: packed where a document has on average at most `model.context` tokens."""
    documents: Literal["auto", "join", "isolate"] = "auto"
    """Whether a token sees documents before its own in the same window (join) or not (isolate);
    auto: not in packed windows."""
    cleaning: tuple[Step, ...] = ()
    """What is done to documents before anything else, in this order: names of steps, or sections
    with their settings (docs/cleaning.md)."""
    repeat: int = Field(1, ge=1)
    """Write the training text this many times (after the validation split), for tiny corpora."""
    val_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the corpus that is held out for validation."""
    split: Literal["auto", "documents", "tail"] = "auto"
    """Hold out whole documents (by hash), or the tail of the text; auto: documents from 20 on."""
    dir: Path = Path("data")
    """Prepared token shards go into a folder below this one, and are found there again."""
    workers: int = Field(0, ge=0)
    """Processes that encode text; 0: one per core."""

    @model_validator(mode="after")
    def _whole_mixture(self) -> Data:
        names = [part.name for part in self.mixture]
        if len(set(names)) < len(names):
            raise ValueError("two corpora of the mixture have the same name")
        weighted = [part.weight is not None for part in self.mixture]
        if any(weighted) and not all(weighted):
            raise ValueError("either all corpora of the mixture have a weight or none")
        return self


def data_of_parts(data: Data) -> list[Data]:
    """Return the settings of each corpus of a mixture, or those of the only one."""
    return [
        data.model_copy(
            update={
                "source": part.source,
                "cleaning": data.cleaning if part.cleaning is None else part.cleaning,
                "mixture": (),
            }
        )
        for part in data.mixture
    ] or [data]
