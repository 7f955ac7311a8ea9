"""The ledger of samples, and the proof that each was seen once per epoch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_corpus import make_corpus

from dtt.cli import main
from dtt.config.load import load_config, to_yaml
from dtt.data.inspection.audit import RECORDED, audit, ledger_number, samples_of
from dtt.data.inspection.location import find_corpora
from dtt.data.ledger import seen
from dtt.data.loader import Loader
from dtt.data.mixture import Shares
from dtt.data.windows import ContiguousWindows
from dtt.tokenizer import ByteTokenizer

TEXTS = [f"document {i} " + "word " * (i % 7) for i in range(40)]
CONTEXT, BATCH = 16, 6


def windows(folder: Path, texts: list[str] = TEXTS) -> ContiguousWindows:
    corpus = make_corpus(folder, {"train": texts}, ByteTokenizer())
    return ContiguousWindows(corpus.stream("train"), CONTEXT, 1)


@pytest.fixture
def loader(tmp_path: Path) -> Loader:
    return Loader([windows(tmp_path / "a")], BATCH, 1)


def rows(loader: Loader, steps: range) -> list[dict[str, float]]:
    """What a run of these steps writes to metrics.jsonl."""
    found: list[dict[str, float]] = []
    for step in steps:
        batch = loader.batch(step - 1)
        number = seen((step - 1) * BATCH, batch.sources, batch.starts)
        found.append({"step": step, "loss": 1.0, RECORDED: number})
        if step % 5 == 0:
            found.append({"step": step, "val_loss": 1.0})
    return found


def steps_for(loader: Loader, epochs: float) -> int:
    return int(epochs * loader.steps_per_epoch) + 1


def test_ranks_parts_add_up_to_the_number_of_one_rank(tmp_path):
    first, second = windows(tmp_path / "a"), windows(tmp_path / "b", TEXTS[:20])
    shares = Shares([0.7, 0.3], [None, None])
    alone = Loader([first, second], BATCH, 1, shares=shares)
    for ranks in (1, 2, 3):
        share = BATCH // ranks
        loaders = [Loader([first, second], BATCH, 1, r, ranks, shares=shares) for r in range(ranks)]
        for step in (0, 1, 17):
            parts = []
            for rank, batch in enumerate(loader.batch(step) for loader in loaders):
                parts.append(seen(step * BATCH + rank * share, batch.sources, batch.starts))
            assert sum(parts) == ledger_number(alone, step, samples_of(alone, step))


def test_a_ledger_number_is_fixed():
    """The arithmetic is a format: numbers of old runs must stay true."""

    def mix(value: int) -> int:  # splitmix64 in plain integers
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    sources, starts = (0, 2, 1), (5, 10**12, 0)
    expected = sum(
        mix(mix(mix(40 + i) ^ source) ^ start) >> 32
        for i, (source, start) in enumerate(zip(sources, starts, strict=True))
    )
    assert seen(40, sources, starts) == expected == 3770618801
    assert seen(0, (), ()) == 0


def test_a_ledger_number_knows_every_sample_and_its_place():
    number = seen(8, (0, 0, 1), (64, 0, 128))
    others = [
        seen(9, (0, 0, 1), (64, 0, 128)),
        seen(8, (0, 1, 0), (64, 0, 128)),
        seen(8, (0, 0, 1), (0, 64, 128)),
        seen(8, (0, 0, 1), (64, 0, 129)),
        seen(8, (0, 0), (64, 0)),
    ]
    assert number not in others and len(set(others)) == len(others)


def test_numbers_of_large_batches_are_exact_in_fp64():
    count = 1 << 16
    number = seen(0, [0] * count, list(range(count)))
    assert number < 2**53 and int(float(number)) == number
    assert abs(number / count / 2**31 - 1) < 0.02  # the mean of 32-bit hashes


def test_samples_are_those_of_the_batches(loader):
    for step in range(40):
        assert tuple(samples_of(loader, step).starts.tolist()) == loader.batch(step).starts


@pytest.mark.parametrize("epochs", [0.3, 1.0, 2.5])
def test_a_whole_run_has_no_fault(loader, epochs):
    last = steps_for(loader, epochs)
    result = audit(loader, rows(loader, range(1, last + 1)))
    assert result.faults == []
    assert (result.first, result.last, result.recorded) == (1, last, last)
    assert result.samples == last * BATCH
    count = loader.sources[0].count
    assert result.epochs[0].progress == divmod(result.samples, count)


def test_mixtures_are_counted_by_source(tmp_path):
    sources = [windows(tmp_path / "a"), windows(tmp_path / "b", TEXTS[:10])]
    loader = Loader(sources, BATCH, 1, shares=Shares([0.5, 0.5], [None, None]))
    result = audit(loader, rows(loader, range(1, 41)))
    assert result.faults == []
    drawn = Counter(int(s) for step in range(40) for s in samples_of(loader, step).sources)
    for source, epochs in enumerate(result.epochs):
        assert epochs.progress == divmod(drawn[source], sources[source].count)


def test_a_run_that_went_on_from_another_counts_its_samples(loader):
    last = steps_for(loader, 1.5)
    result = audit(loader, rows(loader, range(9, last + 1)))
    assert result.faults == [] and result.first == 9


def test_faults_are_named(loader):
    last = steps_for(loader, 1.5)
    good = rows(loader, range(1, last + 1))
    lines = [row for row in good if "loss" in row]
    wrong = [dict(row) for row in lines]
    wrong[6][RECORDED] += 1
    assert audit(loader, wrong).faults == ["step 7 saw other samples than the order has"]
    found = audit(loader, lines[:3] + lines[5:]).faults
    assert found[0] == "steps 4 to 5 have no line"
    assert found[1:] == [f"source 0: epoch 0 left out {2 * BATCH} windows"]
    assert audit(loader, lines[:3] + lines[2:]).faults == ["step 3 has two lines"]
    # A loader that starts over after step 5: what it records is what it read.
    again = [row | {RECORDED: ledger_number(loader, step % 5, samples_of(loader, step % 5))}
             for step, row in enumerate(lines)]  # fmt: skip
    assert audit(loader, again).differing == list(range(6, last + 1))


def test_an_order_that_repeats_itself_is_found(loader, monkeypatch):
    order = loader.orders[0]
    whole = order.places

    def places(first, count):
        epochs, items = whole(first, count)
        return epochs, np.where(items == 3, 4, items)

    monkeypatch.setattr(order, "places", places)
    last = steps_for(loader, 1.0) + 1
    faults = audit(loader, rows(loader, range(1, last + 1))).faults
    assert "source 0: window 4 was seen twice in epoch 0" in faults
    assert "source 0: epoch 0 left out 1 windows" in faults


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder as training leaves it, 30 steps long."""
    monkeypatch.chdir(tmp_path)
    corpus = make_corpus(Path("data/c"), {"train": TEXTS, "val": TEXTS[:3]}, ByteTokenizer())
    given = {"model.context": CONTEXT, "training.batch_size": BATCH, "data.packing": "contiguous"}
    config = load_config(overrides={k: (f"--{k}", str(v)) for k, v in given.items()})
    folder = Path("runs/r")
    (folder / "checkpoints" / "step-00000030").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    state = folder / "checkpoints" / "step-00000030" / "state.json"
    state.write_text(json.dumps({"corpus": corpus.folder.name}), encoding="utf-8")
    write(folder, rows(loader_of(folder), range(1, 31)))
    return folder


def loader_of(folder: Path) -> Loader:
    found = find_corpora(str(folder))
    assert found.config is not None
    return found.corpora.loader(CONTEXT, BATCH, found.config.seed, 0, 1, pin=False)


def write(folder: Path, lines: list[dict[str, float]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def test_the_command_proves_a_run(run, capsys):
    assert main(["data", "audit", str(run), "-o", "ledger.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "runs/r: steps 1 to 30, 180 samples" in out
    assert "recorded while training: 30 of 30 steps, 30 as the order has them" in out
    assert "\nthe run saw no window twice in an epoch" in out
    written = [json.loads(line) for line in Path("ledger.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written] == list(range(1, 31))
    batch = loader_of(run).batch(29)
    assert tuple(written[29]["starts"]) == batch.starts
    assert main(["data", "audit", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["faults"] == []


def test_the_command_shows_a_step(run, capsys):
    assert main(["data", "audit", str(run), "--step", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + BATCH
    starts = loader_of(run).batch(1).starts
    assert [int(line.split()[3]) for line in lines[1:]] == list(starts)


@pytest.mark.parametrize("step", [1, 8, 31, 50])
def test_a_step_that_never_ran_has_no_samples(run, step, capsys):
    write(run, rows(loader_of(run), range(9, 31)))
    assert main(["data", "audit", str(run), "--step", "9"]) == 0
    capsys.readouterr()
    assert main(["data", "audit", str(run), "--step", str(step)]) == 2
    out, err = capsys.readouterr()
    expected = f"--step {step}: runs/r has steps 9 to 30; give a number from 9 to 30"
    assert (out, err) == ("", f"dtt data: error: {expected}\n")
    write(run, [])
    assert main(["data", "audit", str(run), "--step", str(step)]) == 3
    assert "metrics.jsonl has no step yet" in capsys.readouterr().err


def test_a_fault_ends_with_code_3_and_one_line(run, capsys):
    lines = rows(loader_of(run), range(1, 31))
    write(run, lines[:4] + lines[6:])
    assert main(["data", "audit", str(run)]) == 3
    err = capsys.readouterr().err
    assert err.startswith("dtt data: error: runs/r: step 5 has no line (and 1 more); its data")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("data/c", 2, "data/c is a corpus, not a run; name the folder of a run"),
        ("runs/none", 3, "runs/none is not a prepared corpus, a run folder"),
        ("r", 3, "r is not a corpus; did you mean runs/r?"),
    ],
)
def test_what_is_not_a_run_is_named(run, name, code, message, capsys):
    assert main(["data", "audit", name]) == code
    assert message in capsys.readouterr().err


def test_damaged_tokens_and_lines_are_found(run, capsys):
    write(run, [{"step": 0, "loss": 1.0}])
    assert main(["data", "audit", str(run)]) == 3
    assert "runs/r/metrics.jsonl:1 is not a line of metrics" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text('{"step": 1, "lo', encoding="utf-8")
    assert main(["data", "audit", str(run)]) == 3
    assert "runs/r/metrics.jsonl has no step yet" in capsys.readouterr().err
    path = Path("data/c/train-00000.bin")
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    assert main(["data", "audit", str(run)]) == 3
    assert "train-00000.bin is damaged: its SHA-256 is not" in capsys.readouterr().err


def test_a_run_without_its_corpus_or_a_checkpoint_says_so(run, capsys):
    Path("data/c").rename("data/d")
    assert main(["data", "show", str(run)]) == 3
    assert "runs/r was trained on c, which is not below data" in capsys.readouterr().err
    (run / "checkpoints" / "step-00000030" / "state.json").unlink()
    assert main(["data", "show", str(run)]) == 4
    assert "runs/r has no checkpoint yet" in capsys.readouterr().err
