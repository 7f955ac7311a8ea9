"""Generation: exact against recomputation, reproducible, row by row, and pleasant to look at."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtt import generation as module
from dtt.config.model import Learned, Model
from dtt.config.schema import Config
from dtt.errors import StorageError
from dtt.generation import (
    Sampling,
    TextStream,
    encode_prompt,
    generate,
    generate_command,
    next_tokens,
    sample_texts,
    stream_tokens,
    warn_about_prompts,
)
from dtt.model import decoder as decoder_module
from dtt.model.decoder import Decoder
from dtt.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer, train_bpe
from dtt.training.load import LoadedRun

CONTEXT, VOCABULARY = 16, 40
ALPHABET = "abcdefghijklmnopqrstuvwxyz .,!?\n"


def decoder(**settings: Any) -> Decoder:
    shape = {"dim": 16, "layers": 2, "heads": 2, "context": CONTEXT, "vocab_size": VOCABULARY}
    model = Decoder(Model(**(shape | {"init_std": 0.3} | settings)))
    model.init_weights(0)
    return model.eval()


def drawn(model: Decoder, prompts: list[list[int]], count: int, **options: Any) -> list[list[int]]:
    """The tokens of every row, up to its end."""
    options = {"sampling": Sampling(1.0), "seed": 3, "end": -1} | options
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in stream_tokens(model, prompts, count, **options):
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows


def loaded_run(tokenizer: Tokenizer | None = None, **settings: Any) -> LoadedRun:
    tokenizer = tokenizer or CharTokenizer(ALPHABET)
    model = decoder(**({"vocab_size": tokenizer.vocab_size} | settings))
    return LoadedRun(Path("runs/t"), 1, Config(), tokenizer, "text", model)


# Choosing a token


def test_frequencies_are_those_of_the_softmax() -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    count = 20_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for sampling, exact in (
        (Sampling(1.0), torch.softmax(logits[0], -1)),
        (Sampling(0.5), torch.softmax(logits[0] / 0.5, -1)),
        (Sampling(2.0, top_k=5), top_k_by_hand(logits[0] / 2, 5)),
        (Sampling(1.0, top_p=0.8), top_p_by_hand(logits[0], 0.8)),
        (Sampling(1.0, top_k=6, top_p=0.7), top_p_by_hand(top_k_by_hand(logits[0], 6).log(), 0.7)),
    ):
        chosen = next_tokens(logits.expand(count, -1), sampling, uniform)
        counts = torch.bincount(chosen, minlength=12)
        possible = exact > 0
        assert (counts[~possible] == 0).all(), sampling
        expected = exact[possible] * count
        chi_square = float(((counts[possible] - expected) ** 2 / expected).sum())
        freedom = int(possible.sum()) - 1
        assert chi_square < freedom + 5 * math.sqrt(2 * freedom), sampling


def top_k_by_hand(logits: Tensor, k: int) -> Tensor:
    allowed = sorted(range(len(logits)), key=lambda i: -float(logits[i]))[:k]
    weights = torch.tensor(
        [math.exp(logits[i]) if i in allowed else 0.0 for i in range(len(logits))]
    )
    return weights / weights.sum()


def top_p_by_hand(logits: Tensor, p: float) -> Tensor:
    probs = torch.softmax(logits, -1).tolist()
    kept, total = set(), 0.0
    for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
        kept.add(i)
        total += probs[i]
        if total >= p:
            break
    weights = torch.tensor([q if i in kept else 0.0 for i, q in enumerate(probs)])
    return weights / weights.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.0),
        Sampling(1e-300),
        Sampling(1e-5),
        Sampling(1, top_k=1),
        Sampling(1, top_p=1e-9),
    ],
)
def test_what_leaves_one_token_takes_the_likeliest(sampling: Sampling) -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * 10
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(next_tokens(logits, sampling, uniform), logits.argmax(-1))


def test_a_top_p_of_one_and_a_top_k_of_all_leave_every_token() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 7] = 20.0  # the others have 2e-9 each
    uniform = torch.tensor([1 - 1e-9], dtype=torch.float64)
    plain = next_tokens(logits, Sampling(1.0), uniform)
    assert plain.item() == 999
    assert next_tokens(logits, Sampling(1.0, top_k=1000), uniform).item() == 999
    assert next_tokens(logits, Sampling(1.0, top_p=1.0), uniform).item() == 999


def test_the_ends_of_the_uniform_are_tokens_that_are_possible() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    for sampling in (Sampling(1.0), Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.99)):
        for uniform, allowed in ((0.0, {1, 3}), (math.nextafter(1, 0), {1, 3})):
            found = next_tokens(logits, sampling, torch.tensor([uniform], dtype=torch.float64))
            assert found.item() in allowed


# Streams of tokens


@pytest.mark.parametrize("settings", [{}, {"positions": Learned()}, {"window": 4}])
@torch.inference_mode()
def test_greedy_is_the_argmax_of_recomputed_logits(settings: dict[str, Any]) -> None:
    model, seen = decoder(**settings), [5, 6, 7]
    (found,) = drawn(model, [seen], 60, sampling=Sampling(0.0))
    for token in found:
        if len(seen) > CONTEXT:
            seen = seen[-CONTEXT // 2 :]  # beyond the context the newest half is read again
        assert token == int(model(torch.tensor([seen]))[0, -1].argmax())
        seen = [*seen, token]
    assert len(found) == 60


@pytest.mark.parametrize("settings", [{}, {"positions": Learned()}])
def test_a_row_does_not_depend_on_the_others(settings: dict[str, Any]) -> None:
    model = decoder(**settings)
    prompts = [[1], [2, 3, 4, 5, 6, 7, 8], [9] * 12, list(range(30)), [10, 11]]
    both = drawn(model, prompts, 50)
    for i, prompt in enumerate(prompts):
        (alone,) = drawn(model, [prompt], 50, seed=3 + i)
        assert both[i] == alone and len(alone) == 50


def test_the_same_seed_gives_the_same_tokens_and_another_others() -> None:
    model = decoder()
    assert drawn(model, [[1]], 40) == drawn(model, [[1]], 40)
    assert drawn(model, [[1]], 40) != drawn(model, [[1]], 40, seed=4)
    first, second = drawn(model, [[1], [1]], 40)
    assert first != second


def test_more_tokens_begin_with_the_same_ones() -> None:
    model = decoder()
    assert drawn(model, [[1, 2]], 50)[0][:20] == drawn(model, [[1, 2]], 20)[0]


def test_a_row_stops_at_its_end_of_text_and_the_others_go_on() -> None:
    model, prompts = decoder(), [[1], [2], [3]]
    free = drawn(model, prompts, 40)
    end = free[0][10]
    stopped = drawn(model, prompts, 40, end=end)
    for row, full in zip(stopped, free, strict=True):
        assert row == (full[: full.index(end)] if end in full else full)
    steps = list(stream_tokens(model, [[1]], 40, Sampling(1.0), seed=3, end=end))
    assert len(steps) == len(stopped[0])


def test_a_prompt_longer_than_the_context_is_read_from_its_end() -> None:
    model, long = decoder(), [(7 * i) % VOCABULARY for i in range(100)]
    assert drawn(model, [long], 30) == drawn(model, [long[-CONTEXT:]], 30)


@pytest.mark.parametrize("context", [1, 2, 3])
def test_a_tiny_context_works(context: int) -> None:
    assert len(drawn(decoder(context=context), [[1, 2, 3, 4]], 10)[0]) == 10


def test_rows_of_the_embedding_without_a_token_are_never_chosen() -> None:
    model = decoder()
    (row,) = drawn(model, [[1]], 200, vocab_size=5)
    assert set(row) == {0, 1, 2, 3, 4}
    run = loaded_run(vocab_size=200)  # padded far beyond the alphabet
    assert len(generate(run, max_length=60, temperature=5.0)[0]) > 0


def test_the_cache_is_no_larger_than_the_text_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = decoder_module.Cache

    def recording(settings: Model, batch: int, capacity: int, *rest: Any) -> Any:
        made.append(capacity)
        return original(settings, batch, capacity, *rest)

    monkeypatch.setattr(decoder_module, "Cache", recording)
    drawn(decoder(context=100_000), [[1, 2, 3]], 7)
    assert made == [10]


# Texts


def test_texts_begin_with_their_prompts_and_each_prompt_has_its_own() -> None:
    run = loaded_run()
    texts = generate(run, ["once ", "the ", ""], max_length=20, seed=1)
    assert texts[0].startswith("once ") and texts[1].startswith("the ")
    assert generate(run, "the ", max_length=20, seed=2) == [texts[1]]


def test_a_prompt_is_read_as_the_beginning_of_a_document() -> None:
    tokenizer = CharTokenizer(ALPHABET)
    assert encode_prompt(tokenizer, "") == [tokenizer.end_of_text]
    # Two special tokens and six marks come before the letters.
    assert encode_prompt(tokenizer, "ab") == [tokenizer.end_of_text, 8, 9]


@pytest.mark.parametrize("name", ["char", "byte", "bpe"])
def test_a_prompt_that_is_not_utf_8_is_read_as_far_as_it_goes(name: str) -> None:
    tokenizer = STREAMED[name]()
    assert encode_prompt(tokenizer, "ab\udcff") == encode_prompt(tokenizer, "ab\ufffd")


def test_sampling_leaves_the_model_in_its_mode() -> None:
    run = loaded_run(dropout=0.5)
    first = sample_texts(run.model.train(), run.tokenizer, ["a"], 20, Sampling(), seed=0)
    assert run.model.training
    assert first == sample_texts(run.model.eval(), run.tokenizer, ["a"], 20, Sampling(), seed=0)
    assert not run.model.training


# Characters that come in pieces

TEXTS = ["naïve café — Ελληνικά 中文字 🦊🦊!\n\n  two  spaces\n é\nlast", "🦊中é" * 40, "abc " * 60]


def metaspace() -> BpeTokenizer:
    """A tokenizer as Llama 2 has it: spaces are a character, unknown ones are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(c) for c in range(97, 123)]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    data = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [],
            "unk_token": "<unk>",
            "byte_fallback": True,
            "fuse_unk": True,
        },
    }
    return BpeTokenizer(json.dumps(data), "</s>")


STREAMED = {
    "char": lambda: CharTokenizer("".join(TEXTS)),
    "byte": ByteTokenizer,
    "bpe": lambda: train_bpe(iter(TEXTS * 2), 300, ["<|endoftext|>"]),
    "metaspace": metaspace,
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", STREAMED)
def test_streamed_text_is_the_text_and_shows_no_broken_character(name: str, text: str) -> None:
    tokenizer = STREAMED[name]()
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.decode(ids) == text
    stream, shown = TextStream(tokenizer), ""
    for token in ids:
        new = stream.add(token)
        assert "\N{REPLACEMENT CHARACTER}" not in new
        shown += new
        # No more is held back than the last character.
        assert text.startswith(shown)
    assert shown == text and stream.rest() == ""


def test_a_stream_decodes_a_bounded_number_of_tokens_again() -> None:
    class Counting(ByteTokenizer):
        most = 0

        def decode(self, ids: Any) -> str:
            Counting.most = max(Counting.most, len(ids))
            return super().decode(ids)

    stream = TextStream(Counting())
    for token in ("ab🦊" * 500).encode():
        stream.add(token)
    assert Counting.most <= TextStream.RESTART_AFTER + 4


def test_bytes_that_are_no_character_are_shown_in_the_end() -> None:
    stream = TextStream(ByteTokenizer())
    assert [stream.add(b) for b in (0x61, 0xE2, 0x82)] == ["a", "", ""]
    assert stream.rest() == "\N{REPLACEMENT CHARACTER}"
    stream = TextStream(ByteTokenizer())
    text = "".join(stream.add(b) for b in (0xFF, 0xFF, 0x61, 0xE2, 0x82, 0x62))
    assert text == b"\xff\xffa\xe2\x82b".decode("utf-8", "replace")


# The command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """generate_command on a small untrained run; options as keywords."""
    run = loaded_run()
    monkeypatch.setattr(module, "load_run", lambda *given, **options: run)
    defaults: dict[str, Any] = {
        "run": None,
        "prompts": [],
        "max_length": 12,
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
        "seed": 5,
        "num_samples": 1,
        "output": None,
        "interactive": False,
        "checkpoint": "best",
        "device": "cpu",
        "precision": "fp32",
    }

    def call(**options: Any) -> list[str]:
        """Run it and return the texts that it should have written."""
        settings = defaults | options
        assert generate_command(**settings) == 0
        wanted = [p for p in settings["prompts"] for _ in range(settings["num_samples"])]
        if not wanted:
            return []
        seed = settings["seed"]
        return generate(run, wanted, max_length=settings["max_length"], temperature=1.0, seed=seed)

    return call


def test_one_text_is_streamed(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (expected,) = command(prompts=["the "])
    out, err = capsys.readouterr()
    assert out == expected + "\n" and err == ""


def test_several_texts_are_told_apart(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third, fourth = command(prompts=["a ", "b "], num_samples=2)
    assert capsys.readouterr().out == (
        f"--- 1/4\n{first}\n\n--- 2/4\n{second}\n\n--- 3/4\n{third}\n\n--- 4/4\n{fourth}\n"
    )
    assert first.startswith("a ") and third.startswith("b ") and first != second


def test_output_goes_to_a_file(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "texts.txt"
    texts = command(prompts=["a "], num_samples=3, output=path)
    assert path.read_text(encoding="utf-8") == "\n\n".join(texts) + "\n"
    assert capsys.readouterr().out == f"3 texts written to {path}\n"
    (text,) = command(prompts=["a "], output=path)
    assert path.read_text(encoding="utf-8") == text + "\n"
    assert capsys.readouterr().out == f"1 text written to {path}\n"


def test_output_into_a_folder_that_is_not_there(command: Any, tmp_path: Path) -> None:
    with pytest.raises((StorageError, OSError), match="gone"):
        command(prompts=["a "], output=tmp_path / "gone" / "texts.txt")


def test_unknown_characters_of_a_prompt_are_counted(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command(prompts=["é and é, ü"])
    out, err = capsys.readouterr()
    assert out.startswith("é and é, ü")
    assert err == (
        "dtt: warning: the run's tokenizer does not know 3 characters of the prompt: 'é' 'ü'; "
        "the model reads a placeholder there\n"
    )
    warn_about_prompts(loaded_run(CharTokenizer("ab")), ["abc", "ab"])
    assert "does not know 1 character of" in capsys.readouterr().err
    warn_about_prompts(loaded_run(ByteTokenizer()), ["é"])
    assert capsys.readouterr().err == ""


def test_a_prompt_that_the_context_cannot_hold_is_announced(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command(prompts=["a" * (CONTEXT - 1)])
    assert capsys.readouterr().err == ""
    (text,) = command(prompts=["a" * 40])
    out, err = capsys.readouterr()
    assert out == text + "\n" and out.startswith("a" * 40)
    assert err == (
        "dtt: warning: the prompt has 41 tokens; the model sees only the last 16 of them\n"
    )


def test_interactive_continues_each_line_until_an_empty_one(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = [
        generate(loaded_run(), p, max_length=12, temperature=1.0, seed=s)[0]
        for p, s in (("the ", 5), ("a é", 6))
    ]
    for typed in ("the \na é\n", "the \na é\n\nnever\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        command(interactive=True)
        out, err = capsys.readouterr()
        assert out == "".join(f"{text}\n\n" for text in expected)
        assert "does not know 1 character" in err


def test_ctrl_c_in_an_interactive_text_ends_that_text_only(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, original = [], module.stream_tokens

    def interrupted(*given: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        yield from original(*given, **options)

    monkeypatch.setattr(module, "stream_tokens", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    command(interactive=True)
    first, second = capsys.readouterr().out.split("\n\n", 1)
    assert first == "a" and second.startswith("b") and len(calls) == 2


def test_a_terminal_shows_the_prompt_apart_and_obeys_no_control_character(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    (expected,) = command(prompts=["the "])
    assert capsys.readouterr().out == f"\x1b[1mthe \x1b[0m{expected.removeprefix('the ')}\n"
    assert module._printable("a\x1b[2Jb\r\x9bc\td\n") == "a\ufffd[2Jb\ufffd\ufffdc\td\n"
