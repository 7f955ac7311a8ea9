"""What is wrong with a corpus that has been prepared: nothing in a split, or worth a warning."""

from __future__ import annotations

from collections.abc import Iterator

from dtt.data.shards import SPLITS, Manifest
from dtt.errors import DataError

EXPECTED = {"tail": 2.0, "documents": 10.0}
"""How many times data.val_fraction the share of validation may be, by the kind of split: which
documents a hash takes is chance, so that only what a giant one does is worth a word."""


def refuse_empty(manifest: Manifest) -> None:
    """DataError if a split has no text, with what has become of it."""
    for split in SPLITS:
        if manifest.total(split, "bytes"):
            continue
        rest = sum(manifest.total(other, "bytes") for other in SPLITS)
        removed = sum(step["removed"] for step in manifest.cleaning)
        if removed:
            raise DataError(
                f"data.cleaning removed {removed:,} documents and left none for {split}",
                "see with `dtt data inspect` which step does, and change its settings",
            )
        left_out = [f"{why}: {n:,}" for why, n in manifest.bad.items() if why.endswith("left out")]
        if left_out:
            what = f"no text is left for the {split} split" if rest else "all text was left out"
            raise DataError(
                f"{what} ({', '.join(left_out)})",
                "mend the files, or set data.source.on_bad to replace, or to error to see where",
            )
        if not rest:
            raise DataError(
                "the text has no documents, or only blank ones", "give a file with text in it"
            )
        by, fraction = manifest.spec["split"], manifest.spec["val_fraction"]
        tail = "" if by == "tail" else ", or data.split tail"
        raise DataError(
            f"the {split} split is empty (all text: {rest:,} bytes, data.val_fraction {fraction}, "
            f"data.split {by})",
            f"give more text, or another data.val_fraction{tail}",
        )


def warnings(manifest: Manifest) -> Iterator[str]:
    """Yield what is to be said of a corpus that can be used."""
    for split in SPLITS:
        unknown, tokens = manifest.total(split, "unknown"), manifest.total(split, "tokens")
        if unknown:
            yield (
                f"{unknown:,} of {tokens:,} characters of the {split} split do not occur in the "
                "training text; they became the token <unknown>"
            )
    for reason, count in manifest.bad.items():
        yield f"{reason}: {count:,}"
    yield from _share_of_validation(manifest)


def _share_of_validation(manifest: Manifest) -> Iterator[str]:
    split, asked = manifest.spec["split"], manifest.spec["val_fraction"]
    files = {shard.file: shard.bytes for shard in manifest.shards["train"]}  # without data.repeat
    train, val = sum(files.values()), manifest.total("val", "bytes")
    share, most = val / (train + val), EXPECTED[split]
    if share > most * asked or (split == "tail" and share < asked / most):
        yield (
            f"validation has {val:,} of {train + val:,} bytes ({share:.2%}), not the "
            f"{asked:.2%} of data.val_fraction, because of a few long documents"
        )
