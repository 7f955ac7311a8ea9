"""Where documents lie in the stream: against a list of documents that was cut into shards."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from dtt.data import shards
from dtt.data.shards import DocumentIndex, Manifest, write_shard
from dtt.errors import DataError


def make_index(
    folder: Path, documents: list[int], cuts: list[int], ended: bool = True, repeat: int = 1
) -> DocumentIndex:
    """Documents of these lengths (end of text included), cut into shards at these places."""
    stops, total = np.cumsum(documents), sum(documents)
    rows = []
    for index, (a, b) in enumerate(zip([0, *cuts], [*cuts, total], strict=True)):
        ends = stops[(stops > a) & (stops <= b)] - a
        if not ended and b == total:
            ends = ends[:-1]
        tokens, ends = np.zeros(b - a, "<u2"), ends.astype(np.uint64)
        rows.append(write_shard(folder, f"val-{index}", tokens, ends, bytes=1, unknown=0, bits=0.0))
    manifest = Manifest(2, {}, "", "<u2", 10, shards={"val": rows * repeat})
    return DocumentIndex(folder, manifest, "val")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ended", [True, False])
def test_documents_lie_where_they_were_put(tmp_path, monkeypatch, seed, ended):
    monkeypatch.setattr(shards, "ENDS_AT_ONCE", 3)
    draw = random.Random(seed)
    documents = [draw.choice([1, 2, 5, 40]) for _ in range(draw.randint(1, 12))]
    total = sum(documents)
    cuts = sorted(draw.randint(0, total) for _ in range(draw.randint(0, 5)))
    index = make_index(tmp_path, documents, cuts, ended)
    assert len(index) == len(documents)
    assert index.lengths().tolist() == documents
    assert index.lengths().dtype == np.int64
    stops = np.cumsum(documents) + 1
    bounds = [index.bounds(i) for i in range(len(index))]
    assert bounds == [(stop - size, stop) for size, stop in zip(documents, stops, strict=True)]
    expected = [0] + [i for i, size in enumerate(documents) for _ in range(size)]
    assert [index.at(position) for position in range(total + 1)] == expected
    for wrong in (-1, len(documents)):
        with pytest.raises(IndexError):
            index.bounds(wrong)
    with pytest.raises(IndexError):
        index.at(total + 1)


def test_a_repeated_split_has_its_documents_again(tmp_path):
    index = make_index(tmp_path, [3, 4, 5], [5], repeat=3)
    assert index.lengths().tolist() == [3, 4, 5] * 3
    assert index.bounds(8) == (1 + 2 * 12 + 7, 1 + 3 * 12)


def test_an_empty_split_has_no_documents(tmp_path):
    index = DocumentIndex(tmp_path, Manifest(2, {}, "", "<u2", 10, shards={"val": []}), "val")
    assert len(index) == 0 and index.lengths().tolist() == []


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (None, "val-0.docs is missing; run the same `dtt tokenize` with --force"),
        ([3], "val-0.docs is damaged: 8 bytes instead of 16"),
        ([3, 9], "val-0.docs is damaged: a document ends behind its 7 tokens"),
        ([7, 3], "val-0.docs is damaged: its document ends do not rise"),
        ([3, 3], "val-0.docs is damaged: its document ends do not rise"),
        ([4, 7], "val-0.docs is damaged: its SHA-256 is not the manifest's"),
    ],
)
def test_damage_is_named(tmp_path, ends, message):
    manifest = Manifest(2, {}, "", "<u2", 10, shards={"val": []})
    row = write_shard(
        tmp_path, "val-0", np.zeros(7, "<u2"), np.array([3, 7]), bytes=1, unknown=0, bits=None
    )
    manifest.shards["val"].append(row)
    path = tmp_path / "val-0.docs"
    path.unlink()
    if ends is not None:
        path.write_bytes(np.array(ends, "<u8").tobytes())
    with pytest.raises(DataError) as error:
        index = DocumentIndex(tmp_path, manifest, "val")
        index.lengths()
        index.verify()
    assert str(error.value).startswith(f"{tmp_path}/{message}")
