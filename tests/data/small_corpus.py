"""A prepared corpus of given documents, written as `dtt tokenize` writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np

from dtt import storage
from dtt.data.preparation.prepare import Corpus, open_corpus
from dtt.data.shards import FORMAT, Manifest, write_shard
from dtt.tokenizer import Tokenizer, fingerprint


@patch("os.fsync", lambda handle: None)  # a test does not outlive its machine
def make_corpus(
    folder: Path,
    documents: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer,
    *,
    per_shard: int = 3,
    repeat: int = 1,
    ended: bool = True,
) -> Corpus:
    """Write documents by split; without `ended` the last one of each has no end of text."""
    folder.mkdir(parents=True)
    storage.write_atomic(folder / "tokenizer.json", tokenizer.to_json())
    manifest = Manifest(
        format=FORMAT,
        spec={"tokenizer": {"name": "byte"}},
        tokenizer=fingerprint(tokenizer),
        dtype="<u2",
        vocab_size=tokenizer.vocab_size,
        bad={"undecodable documents, left out": 2},
    )
    for split, texts in documents.items():
        rows = []
        for first in range(0, len(texts), per_shard):
            ids, ends = [], []
            for number, text in enumerate(texts[first : first + per_shard], first):
                ids += tokenizer.encode(text).tolist()
                if ended or number < len(texts) - 1:
                    ids.append(tokenizer.end_of_text)
                    ends.append(len(ids))
            size = sum(len(text.encode()) for text in texts[first : first + per_shard])
            rows.append(
                write_shard(
                    folder,
                    f"{split}-{first:05d}",
                    np.array(ids, "<u2"),
                    np.array(ends, np.uint64),
                    bytes=size,
                    unknown=sum(token == tokenizer.unknown for token in ids),
                    bits=None,
                )
            )
        manifest.shards[split] = rows * (repeat if split == "train" else 1)
    storage.write_atomic(folder / "manifest.json", manifest.to_json())
    return open_corpus(folder)
