"""Token streams for tests: small, on disk, with known documents."""

from pathlib import Path

import numpy as np

from dtt.data.shards import Manifest, TokenStream, write_shard

END = 999


def document_stream(folder: Path, lengths: list[int], per_shard: int = 2) -> TokenStream:
    """A stream of documents of `lengths` tokens; all but the ends are numbered through from 1."""
    shards, number = [], 1
    for first in range(0, len(lengths), per_shard):
        tokens: list[int] = []
        ends = []
        for length in lengths[first : first + per_shard]:
            tokens += [*range(number, number + length - 1), END]
            number += length - 1
            ends.append(len(tokens))
        shards.append(
            write_shard(
                folder,
                f"train-{first:05d}",
                np.array(tokens, "<u2"),
                np.array(ends, np.uint64),
                bytes=len(tokens),
                unknown=0,
                bits=None,
            )
        )
    return TokenStream(
        folder, Manifest(2, {}, "", "<u2", 1000, shards={"train": shards}), "train", END
    )
