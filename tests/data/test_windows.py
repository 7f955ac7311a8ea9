"""Windows of a stream: every target once, whole documents where they fit, places in documents."""

import numpy as np
import pytest
from token_streams import END, document_stream

from dtt.data.loader import Loader, overlapping_batches, packed_batches
from dtt.data.mixture import Shares
from dtt.data.packing import PackedWindows, divide, pack
from dtt.data.windows import IGNORED, ContiguousWindows, document_positions
from dtt.errors import DataError


@pytest.mark.parametrize("length", [11, 20, 21, 101, 999])
def test_contiguous_windows_divide_the_stream_anew_each_epoch(tmp_path, length):
    windows = ContiguousWindows(document_stream(tmp_path, [length - 1]), 10, seed=4)
    shifts = set()
    for epoch in range(3):
        starts = windows.starts(np.arange(windows.count), epoch)
        assert (np.diff(starts) == 10).all()
        assert starts.min() >= 0 and starts.max() + 11 <= length
        shifts.add(int(starts[0]))
    assert windows.starts(np.arange(1), 0)[0] == 0
    assert length < 21 or len(shifts) > 1


def test_pack_fills_bins_best_fit_first():
    # 6 -> a; 5 -> b; 4 fits a exactly; 3 and 2 fit b exactly; 2 opens c.
    lengths = np.array([2, 6, 3, 5, 4, 2])
    bins = pack(lengths, 10)
    assert bins[1] == bins[4] and bins[3] == bins[2] and {bins[0], bins[5]} == {bins[3], 2}


@pytest.mark.parametrize("context", [1, 7, 64, 300])
def test_pack_never_overfills_and_wastes_little(context):
    lengths = np.random.default_rng(0).integers(1, context + 1, 5000)
    bins = pack(lengths, context)
    filled = np.bincount(bins, weights=lengths)
    assert (filled <= context).all() and (filled > 0).all()
    assert len(filled) <= np.ceil(lengths.sum() / context) * 1.02


def test_pack_is_best_fit_decreasing():
    """Against the textbook's loop over single pieces."""
    lengths = np.random.default_rng(1).integers(1, 33, 300)
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(32 - length)
    filled = np.bincount(pack(lengths, 32), weights=lengths)
    assert sorted((32 - filled).tolist()) == sorted(rooms)


@pytest.mark.parametrize("lengths", [[5], [16], [40], [3, 16, 40, 1, 1, 33, 15, 8]])
def test_divide_covers_every_target_once(lengths):
    pieces, first = divide(np.array(lengths), 16)
    seen = sorted(p for start, n in pieces.tolist() for p in range(start, start + n))
    assert seen == list(range(sum(lengths)))
    sizes = np.add.reduceat(pieces[:, 1], first[:-1])
    assert (sizes <= 16).all() and sizes.sum() == sum(lengths)
    edges = np.cumsum([0, *lengths])
    for start, n in pieces.tolist():
        document = np.searchsorted(edges, start, "right") - 1
        assert start + n <= edges[document + 1]
        assert n == 16 or start + n == edges[document + 1]  # cut in full windows only


def test_packed_windows_hold_whole_documents(tmp_path):
    stream = document_stream(tmp_path, [5, 3, 9, 4, 2])
    windows = PackedWindows(stream, 8)
    whole = stream.read(0, len(stream)).tolist()
    found = []
    for window in range(windows.count):
        tokens, targets = np.zeros(8, np.int64), np.full(8, IGNORED)
        pieces = windows.fill(window, 0, tokens, targets)
        size = int(windows.sizes(np.array([window]))[0])
        assert (targets != IGNORED).tolist() == [i < size for i in range(8)]
        for a, b in zip(pieces, [*pieces[1:], size], strict=True):
            start = whole.index(targets[a]) - 1 if targets[a] != END else None
            if start is not None:
                assert tokens[a:b].tolist() == whole[start : start + b - a]
        found += targets[:size].tolist()
    assert sorted(found) == sorted(whole[1:])
    assert windows.padding == 1 - 23 / (8 * windows.count)


def test_packing_is_found_again_and_made_in_memory_where_it_cannot_be_kept(tmp_path, monkeypatch):
    stream = document_stream(tmp_path, [5, 3, 9, 4, 2])
    made = PackedWindows(stream, 8)
    files = {p.name: p.read_bytes() for p in tmp_path.glob("*packed*")}
    assert len(files) == 3
    again = PackedWindows(stream, 8)
    assert (again.starts(np.arange(3), 0) == made.starts(np.arange(3), 0)).all()
    for name in files:
        (tmp_path / name).unlink()

    def refuse(*_):
        from dtt.errors import StorageError

        raise StorageError("read-only")

    monkeypatch.setattr("dtt.storage.write_stream_atomic", refuse)
    assert (PackedWindows(stream, 8).starts(np.arange(3), 0) == made.starts(np.arange(3), 0)).all()
    assert not list(tmp_path.glob("*packed*"))


def test_a_damaged_packing_is_made_again(tmp_path):
    stream = document_stream(tmp_path, [5, 3, 9, 4, 2])
    expected = PackedWindows(stream, 8).starts(np.arange(3), 0).tolist()
    for path in sorted(tmp_path.glob("*packed*")):
        good = path.read_bytes()
        middle = len(good) // 2 + 40
        flipped = good[:-5] + bytes([good[-5] ^ 1]) + good[-4:]
        for damage in (flipped, good[:middle], b"", None):
            path.unlink() if damage is None else path.write_bytes(damage)
            assert PackedWindows(stream, 8).starts(np.arange(3), 0).tolist() == expected
            assert path.read_bytes() == good


def test_documents_that_are_not_the_manifests_are_refused(tmp_path):
    stream = document_stream(tmp_path, [5, 3, 9, 4, 2])
    path = tmp_path / "train-00000.docs"
    ends = np.frombuffer(path.read_bytes(), "<u8").copy()
    ends[0] += 1
    path.write_bytes(ends.tobytes())
    with pytest.raises(DataError, match=r"train-00000\.docs.*SHA-256"):
        PackedWindows(stream, 8)


def test_positions_restart_at_documents_pieces_and_padding():
    first = np.array([END, 1, 2, END, 4, 9, 9, 0])
    assert document_positions(first, 7, [0, 3, 5], END).tolist() == [0, 1, 2, 0, 1, 0, 1, 0]
    second = np.array([7, 8, 9, 9, END, 1, 1, 1])
    assert document_positions(second, 8, [0], END).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_batch_isolates_the_documents_of_the_sources_that_ask_for_it(tmp_path):
    stream = document_stream(tmp_path, [5, 3, 9, 4, 2])
    packed, joined = PackedWindows(stream, 8, END), ContiguousWindows(stream, 8, 0)
    batch = Loader([packed, joined], 8, 0, shares=Shares([1, 1], [None, None])).batch(0)
    rows = batch.positions.tolist()
    assert all(rows[i] == list(range(8)) for i, source in enumerate(batch.sources) if source == 1)
    assert any(rows[i] != list(range(8)) for i, source in enumerate(batch.sources) if source == 0)
    assert (batch.positions[batch.targets == IGNORED] == 0).all()
    assert batch.count == int((batch.targets != IGNORED).sum())
    assert Loader([joined], 8, 0).batch(0).positions is None


@pytest.mark.parametrize("ranks", [1, 3])
def test_packed_evaluation_has_every_target_once(tmp_path, ranks):
    lengths = [5, 3, 9, 4, 2, 30, 7]
    windows = PackedWindows(document_stream(tmp_path, lengths), 8)
    seen: list[int] = []
    for rank in range(ranks):
        for batch in packed_batches(windows, 2, rank=rank, ranks=ranks):
            assert batch.count == int((batch.targets != IGNORED).sum())
            seen += batch.targets[batch.targets != IGNORED].tolist()
    assert sorted(seen) == sorted(windows.stream.read(1, sum(lengths)).tolist())
    some = list(packed_batches(windows, 2, max_tokens=20))
    assert 20 <= sum(batch.count for batch in some) < 20 + 2 * 8


def test_overlapping_windows_know_their_documents(tmp_path):
    stream = document_stream(tmp_path, [5, 3, 9])
    (batch,) = overlapping_batches(stream, 20, 4, isolate=END)
    assert batch.positions.tolist() == [[*range(5), *range(3), *range(9), 0, 0, 0]]
    whole = [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    (batch,) = overlapping_batches(stream, 8, 4, stride=3, isolate=END)
    for start, row in zip(batch.starts, batch.positions.tolist(), strict=True):
        # A window that begins inside of a document sees it from there on.
        inside = whole[start : start + 8]
        first_end = next((i for i, p in enumerate(inside) if p == 0), 8)
        assert row[:first_end] == list(range(first_end))
        assert row[first_end : len(inside)] == inside[first_end:]
