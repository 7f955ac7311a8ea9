"""Evaluation against direct computation: every token once, however it is divided."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtt import evaluation as module
from dtt.config.data import Byte, Char, Data, Ingredient, TokenizerFile
from dtt.config.model import Model
from dtt.config.schema import Config
from dtt.config.sources import Tales, Text
from dtt.data.corpora import Corpora, Portion
from dtt.data.preparation.prepare import Corpus, prepare
from dtt.dist import Place, Runtime
from dtt.errors import ConfigError, DataError
from dtt.evaluation import Evaluation, evaluate_command
from dtt.model.decoder import Decoder
from dtt.model.objective import Objective
from dtt.parallel.layout import Layout
from dtt.parallel.mesh import Mesh
from dtt.parallel.model import ParallelModel
from dtt.training.load import LoadedRun

CONTEXT = 16
ALONE = Runtime(Place(), torch.device("cpu"))
SENTENCES = "The fox saw a hen. Why did it run, Max?\n\n“Naïve”, said the owl: 7 € is too much.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpora")


@pytest.fixture(scope="module")
def data(folder: Path) -> Data:
    path = folder / "book.txt"
    path.write_text(SENTENCES * 40, encoding="utf-8")
    source = Text(path=(str(path),))
    return Data(source=source, dir=folder / "data", val_fraction=0.2, workers=1)


@pytest.fixture(scope="module")
def corpus(data: Data) -> Corpus:
    return prepare(data, Char())


def decoder(corpus: Corpus, **settings: Any) -> Decoder:
    shape = {"dim": 16, "layers": 1, "heads": 2, "context": CONTEXT, "init_std": 0.3}
    model = Decoder(Model(**(shape | {"vocab_size": corpus.manifest.vocab_size} | settings)))
    model.init_weights(0)
    return model.eval()


def of_rank(model: Decoder, runtime: Runtime = ALONE) -> ParallelModel:
    layout = Layout(replicate=runtime.ranks)
    return ParallelModel([Objective(model)], Mesh(layout, runtime))


def evaluate(
    model: Decoder, corpus: Corpus, split: str, runtime: Runtime = ALONE, **settings: Any
) -> Evaluation:
    """The figures of one corpus, windows following each other."""
    corpora = Corpora(Data(packing="contiguous"), (Portion("", corpus, 1.0),))
    result, parts = module.evaluate(of_rank(model, runtime), corpora, split, **settings)
    assert parts == {}
    return result


def stream_of(corpus: Corpus, split: str = "val") -> Tensor:
    stream = corpus.stream(split)
    return torch.from_numpy(stream.read(0, len(stream)))


@torch.inference_mode()
def nats_of(model: Decoder, tokens: Tensor, first: int, start: int, stop: int) -> float:
    """The loss of targets [start, stop), given the tokens from `first` on: one forward."""
    logits = model(tokens[None, first:stop])[0, start - first :]
    return float(F.cross_entropy(logits.double(), tokens[start + 1 : stop + 1], reduction="sum"))


def test_the_whole_split_is_the_sum_of_its_windows(corpus: Corpus) -> None:
    model, tokens = decoder(corpus), stream_of(corpus)
    count = len(tokens) - 1
    assert count % CONTEXT  # the last window is shorter
    nats = sum(
        nats_of(model, tokens, start, start, min(start + CONTEXT, count))
        for start in range(0, count, CONTEXT)
    )
    found = evaluate(model, corpus, "val", batch_size=4)
    assert found.tokens == count == corpus.manifest.total("val", "tokens")
    assert found.loss == pytest.approx(nats / count, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nats / count), rel=1e-5)
    # The corpus is one document, and its validation text the tail of it.
    size = corpus.manifest.total("val", "bytes")
    text = corpus.tokenizer.decode(tokens.tolist())
    assert size == len(text.encode()) > len(text)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert found.floor is None and found.above_floor is None


def test_windows_that_overlap_give_every_target_more_text_before_it(corpus: Corpus) -> None:
    model, tokens, stride = decoder(corpus), stream_of(corpus), 5
    count = len(tokens) - 1
    nats = nats_of(model, tokens, 0, 0, CONTEXT)
    for start in range(CONTEXT, count, stride):
        stop = min(start + stride, count)
        nats += nats_of(model, tokens, start + stride - CONTEXT, start, stop)
    found = evaluate(model, corpus, "val", batch_size=3, stride=stride)
    assert found.tokens == count
    assert found.loss == pytest.approx(nats / count, rel=1e-6)


@pytest.mark.parametrize("stride", [None, 1, 7])
def test_the_size_of_a_batch_does_not_matter(corpus: Corpus, stride: int | None) -> None:
    model = decoder(corpus)
    found = [
        evaluate(model, corpus, "val", batch_size=size, stride=stride, max_tokens=150)
        for size in (1, 3, 1000)
    ]
    assert {result.tokens for result in found} == {150}
    for result in found[1:]:
        assert result.loss == pytest.approx(found[0].loss, rel=1e-6)


@dataclass(frozen=True)
class OneOfSeveral(Runtime):
    """A rank whose sum over all ranks is done later, by the test."""

    totals: list[Tensor] = field(default_factory=list)

    def sum(self, values: Tensor) -> Tensor:
        self.totals.append(values.clone())
        return values


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_see_what_one_sees(corpus: Corpus, ranks: int) -> None:
    model, cpu = decoder(corpus), torch.device("cpu")
    alone = evaluate(model, corpus, "val", batch_size=4)
    members = [OneOfSeveral(Place(rank, ranks), cpu) for rank in range(ranks)]
    for member in members:
        evaluate(model, corpus, "val", member, batch_size=4)
    totals = torch.stack([m.totals[0] for m in members]).sum(0)
    nats, count, stopped = totals.tolist()
    assert (
        stopped == 0
        and count == alone.tokens
        and nats / count == pytest.approx(alone.loss, rel=1e-9)
    )
    assert all(0 < m.totals[0][1] < alone.tokens for m in members)


class Asked(OneOfSeveral):
    """One of two ranks, of which the other was asked to stop."""

    def sum(self, values: Tensor) -> Tensor:
        others = torch.ones_like(values)
        return super().sum(values) + others


@pytest.mark.parametrize("asked", ["this", "the other"])
def test_all_ranks_stop_when_one_is_asked(corpus: Corpus, asked: str) -> None:
    model, cpu = decoder(corpus).train(), torch.device("cpu")
    runtime = (Asked if asked == "the other" else OneOfSeveral)(Place(0, 2), cpu)
    with pytest.raises(module.CutShort):
        evaluate(model, corpus, "val", runtime, batch_size=4, stop=lambda: asked == "this")
    assert model.training
    assert (runtime.totals[0][1] == 0) == (asked == "this")  # not one batch after that
    # Where ranks divide the model they ask each other before every batch.
    divided: Any = SimpleNamespace(
        settings=SimpleNamespace(context=CONTEXT), mesh=SimpleNamespace(runtime=runtime)
    )
    steps = module._in_step(iter(()), divided, 4, lambda: asked == "this")
    with pytest.raises(module.CutShort):
        next(steps)


def test_a_part_of_a_split_has_the_bytes_per_token_of_the_whole(corpus: Corpus) -> None:
    model, manifest = decoder(corpus), corpus.manifest
    found = evaluate(model, corpus, "train", batch_size=4, max_tokens=100)
    assert found.tokens == 100
    per_token = manifest.total("train", "bytes") / manifest.total("train", "tokens")
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) / per_token, rel=1e-9)


def test_a_model_that_knows_nothing_pays_for_every_token_alike(corpus: Corpus) -> None:
    model = decoder(corpus)
    torch.nn.init.zeros_(model.head_weight)
    found = evaluate(model, corpus, "val", batch_size=4)
    assert found.loss == pytest.approx(math.log(corpus.manifest.vocab_size), rel=1e-6)


def test_dropout_is_off_and_the_model_comes_back_in_its_mode(corpus: Corpus) -> None:
    model = decoder(corpus, dropout=0.5).train()
    found = evaluate(model, corpus, "val", batch_size=4)
    assert model.training
    assert found == evaluate(decoder(corpus), corpus, "val", batch_size=4)


def test_tales_have_a_floor(folder: Path) -> None:
    settings = Data(source=Tales(stories=40), dir=folder / "data", val_fraction=0.2, workers=1)
    corpus = prepare(settings, Byte())
    found = evaluate(decoder(corpus), corpus, "val", batch_size=32, max_tokens=500)
    bits = corpus.manifest.ideal_bits("val")
    assert bits is not None and found.floor == bits / corpus.manifest.total("val", "bytes")
    assert 0.1 < found.floor < 1.5 < found.bits_per_byte
    assert found.above_floor == pytest.approx(found.bits_per_byte / found.floor - 1)


def test_the_line_that_a_person_reads() -> None:
    plain = Evaluation(loss=1.5, perplexity=math.exp(1.5), tokens=10, bits_per_byte=2.0)
    assert plain.line() == "loss 1.5000  ppl 4.482  2.0000 bits/byte"
    known = Evaluation(1.5, math.exp(1.5), 10, 0.9, floor=0.75)
    assert known.line() == ("loss 1.5000  ppl 4.482  0.9000 bits/byte (floor 0.7500, +20.0%)")


def test_packed_windows_give_every_target_and_isolated_documents_their_own_loss(
    tmp_path: Path,
) -> None:
    data = Data(source=Tales(stories=60), dir=tmp_path, val_fraction=0.2, documents="isolate")
    corpus = prepare(data, Byte())
    model = decoder(corpus, context=2000)  # three stories in a window
    corpora = Corpora(data, (Portion("", corpus, 1.0),))
    found, _ = module.evaluate(of_rank(model), corpora, "val", batch_size=4)
    assert corpora.packing(corpora.portions[0], 2000) == "best-fit"
    assert found.tokens == corpus.manifest.total("val", "tokens")
    tokens = stream_of(corpus)
    ends = [0, *(tokens[1:] == corpus.tokenizer.end_of_text).nonzero()[:, 0].add(1).tolist()]
    nats = sum(nats_of(model, tokens, a, a, b) for a, b in itertools.pairwise(ends))
    assert found.loss == pytest.approx(nats / found.tokens, rel=1e-5)


def test_a_mixture_has_the_figures_of_its_corpora_in_their_shares(
    corpus: Corpus, tmp_path: Path
) -> None:
    text = tmp_path / "other.txt"
    text.write_text("The owl ran at a fox. " * 200, encoding="utf-8")
    given = TokenizerFile(path=corpus.folder)
    other = prepare(Data(source=Text(path=(str(text),)), dir=tmp_path), given)
    model = decoder(corpus)
    ingredients = (
        Ingredient(name="a", source=Tales()),  # what they were made from does not matter here
        Ingredient(name="b", source=Tales()),
    )
    corpora = Corpora(
        Data(mixture=ingredients), (Portion("a", corpus, 0.75), Portion("b", other, 0.25))
    )
    found, parts = module.evaluate(of_rank(model), corpora, "val", batch_size=4)
    a, b = (evaluate(model, one, "val", batch_size=4) for one in (corpus, other))
    assert parts == {"a": a, "b": b}
    assert found.loss == pytest.approx(0.75 * a.loss + 0.25 * b.loss)
    bytes_a, bytes_b = (c.manifest.total("val", "bytes") / c.manifest.total("val", "tokens")
                        for c in (corpus, other))  # fmt: skip
    bits = found.loss / math.log(2) / (0.75 * bytes_a + 0.25 * bytes_b)
    assert found.bits_per_byte == pytest.approx(bits) and found.floor is None


# The command


@pytest.fixture
def command(data: Data, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Any:
    model = decoder(corpus)
    config = Config(data=data, tokenizer=Char(), model=model.settings)
    run = LoadedRun(Path("runs/t"), 7, config, corpus.tokenizer, corpus.folder.name, model)
    defaults: dict[str, Any] = {
        "run": None,
        "checkpoint": "best",
        "split": "val",
        "stride": None,
        "batch_size": None,
        "max_tokens": None,
        "device": "cpu",
        "precision": "fp32",
        "json": False,
    }

    def call(loaded: LoadedRun = run, **options: Any) -> int:
        monkeypatch.setattr(module, "load_run", lambda *given, **rest: loaded)
        return evaluate_command(**(defaults | options))

    call.run = run  # type: ignore[attr-defined]
    return call


def test_json_is_one_line_with_all_figures(
    command: Any, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(json=True) == 0
    out = capsys.readouterr().out
    row = json.loads(out)
    expected = evaluate(command.run.model, corpus, "val", batch_size=12)
    assert out.count("\n") == 1
    assert row == {
        "run": "runs/t",
        "step": 7,
        "split": "val",
        "loss": pytest.approx(expected.loss),
        "perplexity": pytest.approx(expected.perplexity),
        "tokens": expected.tokens,
        "bits_per_byte": pytest.approx(expected.bits_per_byte),
        "floor": None,
        "above_floor": None,
    }


def test_the_text_names_run_step_split_and_figures(
    command: Any, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(split="train", max_tokens=2000, batch_size=3) == 0
    head, figures, speed = capsys.readouterr().out.splitlines()
    assert head == f"runs/t, step 7, train split of {corpus.folder}"
    assert figures.startswith("loss ") and speed.startswith("2,000 tokens in ")


def test_a_stride_beyond_the_context_is_refused(command: Any) -> None:
    with pytest.raises(ConfigError, match=r"--stride 17 .* context \(16\)"):
        command(stride=CONTEXT + 1)


def test_a_text_that_changed_is_refused(command: Any, data: Data, folder: Path) -> None:
    path = folder / "other.txt"
    path.write_text("0123456789" * 100, encoding="utf-8")
    changed = data.model_copy(update={"source": Text(path=(str(path),))})
    run = command.run
    config = run.config.model_copy(update={"data": changed})
    other = LoadedRun(run.folder, 7, config, run.tokenizer, run.corpus, run.model)
    with pytest.raises(DataError, match="the text has changed since"):
        command(loaded=other)
