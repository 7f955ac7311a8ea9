"""Batches: a function of (seed, step, rank), and every evaluation target exactly once."""

from pathlib import Path

import numpy as np
import pytest

from dtt.data.loader import Loader, overlapping_batches
from dtt.data.shards import Manifest, TokenStream, write_shard
from dtt.data.windows import IGNORED, ContiguousWindows
from dtt.errors import DataError

END = 999


def make_stream(folder: Path, lengths: list[int]) -> TokenStream:
    """A stream whose token at place i (from 1) is i."""
    shards, start = [], 1
    for index, length in enumerate(lengths):
        tokens = np.arange(start, start + length).astype("<u2")
        ends = np.array([length], np.uint64)
        shards.append(
            write_shard(folder, f"train-{index}", tokens, ends, bytes=length, unknown=0, bits=None)
        )
        start += length
    manifest = Manifest(1, {}, "", "<u2", 1000, shards={"train": shards})
    return TokenStream(folder, manifest, "train", END)


def test_stream_reads_across_shards(tmp_path):
    stream = make_stream(tmp_path, [3, 5, 1, 4])
    assert len(stream) == 14
    whole = [END, *range(1, 14)]
    for start in range(14):
        for length in range(1, 15):
            assert stream.read(start, length).tolist() == whole[start : start + length]


def test_ranks_share_the_batch_of_one_rank(tmp_path):
    stream = make_stream(tmp_path, [100, 200])
    windows = [ContiguousWindows(stream, 8, 3)]
    alone = Loader(windows, 12, 3)
    for step in (0, 1, 7):
        together = [Loader(windows, 12, 3, rank, 3).batch(step).starts for rank in range(3)]
        assert sum(together, ()) == alone.batch(step).starts


def test_targets_are_the_next_tokens(tmp_path):
    batch = Loader([ContiguousWindows(make_stream(tmp_path, [300]), 8, 3)], 4, 3).batch(5)
    assert (batch.tokens[:, 1:] == batch.targets[:, :-1]).all()
    assert batch.targets[:, 0].tolist() == [start + 1 for start in batch.starts]


def test_reading_ahead_gives_the_same_batches(tmp_path):
    loader = Loader([ContiguousWindows(make_stream(tmp_path, [300]), 8, 3)], 4, 3)
    ahead = loader.iter_from(3)
    assert [next(ahead).starts for _ in range(5)] == [loader.batch(s).starts for s in range(3, 8)]
    ahead.close()


def test_one_window_is_enough(tmp_path):
    windows = ContiguousWindows(make_stream(tmp_path, [8]), 8, 3)
    assert Loader([windows], 4, 3).batch(2).starts == (0, 0, 0, 0)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 50])
@pytest.mark.parametrize("stride", [None, 1, 3, 8])
@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluation_has_every_target_once(tmp_path, length, stride, ranks):
    stream = make_stream(tmp_path, [length])
    seen: list[int] = []
    for rank in range(ranks):
        for batch in overlapping_batches(stream, 8, 2, stride=stride, rank=rank, ranks=ranks):
            wanted = batch.targets != IGNORED
            seen += batch.targets[wanted].tolist()
            before = [END if t == 1 else t - 1 for t in batch.targets[wanted].tolist()]
            assert batch.tokens[wanted].tolist() == before
    assert sorted(seen) == list(range(1, length + 1))


def test_stride_gives_context(tmp_path):
    stream = make_stream(tmp_path, [50])
    for batch in overlapping_batches(stream, 8, 4, stride=2):
        for row, start in zip(batch.targets, batch.starts, strict=True):
            first = int((row != IGNORED).nonzero()[0])
            assert first >= 6 or start == 0


def test_max_tokens(tmp_path):
    stream = make_stream(tmp_path, [50])
    batches = list(overlapping_batches(stream, 8, 4, max_tokens=21))
    assert sum(int((b.targets != IGNORED).sum()) for b in batches) == 21


def test_missing_and_cut_shards_are_named(tmp_path):
    stream = make_stream(tmp_path, [50])
    path = tmp_path / "train-0.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train-0\.bin has 99 bytes instead of 100"):
        TokenStream(tmp_path, stream.manifest, "train", END)
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        TokenStream(tmp_path, stream.manifest, "train", END)


def test_a_token_beyond_the_vocabulary_is_found_when_it_is_read(tmp_path):
    stream = make_stream(tmp_path, [50])
    path = tmp_path / "train-0.bin"
    tokens = np.frombuffer(path.read_bytes(), "<u2").copy()
    tokens[40] = 1000
    path.write_bytes(tokens.tobytes())
    assert len(stream.read(0, 41)) == 41
    with pytest.raises(DataError, match=r"token 1000 at place 41 of the train split is beyond"):
        stream.read(30, 15)


def test_a_flipped_bit_is_found(tmp_path):
    stream = make_stream(tmp_path, [50])
    stream.verify()
    path = tmp_path / "train-0.bin"
    data = bytearray(path.read_bytes())
    data[40] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match="SHA-256"):
        stream.verify()
