"""Text from a model: batched prompts, a cache of keys and values, tokens as they come."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dtt import storage
from dtt.errors import EXIT_DONE
from dtt.model.attention import Cache
from dtt.model.decoder import Decoder
from dtt.tokenizer import Tokenizer
from dtt.train.load import LoadedRun, load_run


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its distribution."""

    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_k: int | None = None
    top_p: float | None = None


def next_tokens(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Choose one token per row of logits [B, V], by inverting the distribution at `uniform` [B].

    top_k keeps the k likeliest; top_p then the smallest set of the likeliest that together have at
    least that probability (Holtzman et al. 2019). Each row depends on its own number only.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    order = None
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits, order = logits.topk(sampling.top_k)
    elif sampling.top_p is not None:
        logits, order = logits.sort(descending=True)
    weights = torch.softmax(logits, -1).double()
    if sampling.top_p is not None:
        # A token stays if those before it do not yet have the probability.
        weights = weights * (weights.cumsum(-1) - weights < sampling.top_p)
    totals = weights.cumsum(-1)
    chosen = torch.searchsorted(totals, uniform[:, None] * totals[:, -1:], right=True)
    chosen = chosen.clamp(max=totals.shape[-1] - 1)
    return (chosen if order is None else order.gather(-1, chosen)).squeeze(-1)


@torch.inference_mode()
def stream_tokens(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    count: int,
    sampling: Sampling,
    *,
    seed: int,
    end: int,
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt, `count` times or until all have met `end`.

    None stands for a row that has ended. Row i draws from its own stream of (seed + i), so its text
    does not depend on the other rows. When the context is full, the newest half of it is read
    again, and generation goes on.
    """
    device, limit = model.embed.weight.device, model.settings.context
    rows = [list(prompt)[-(limit - 1) :] if limit > 1 else list(prompt)[-1:] for prompt in prompts]
    draws = [torch.Generator().manual_seed(seed + i) for i in range(len(rows))]
    ended = [False] * len(rows)
    cache: Cache | None = None
    fed = _padded(rows, device)
    for _ in range(count):
        if cache is None or cache.length + 1 > limit:
            if cache is not None:
                rows = [row[-max(1, limit // 2) :] for row in rows]
                fed = _padded(rows, device)
            longest = max(len(row) for row in rows)
            padding = torch.tensor([longest - len(row) for row in rows], device=device)
            cache = Cache(model.settings, len(rows), limit, padding, model.compute_dtype)
        logits = model.next_logits(fed, cache)
        uniform = torch.tensor([float(torch.rand((), generator=g)) for g in draws])
        chosen = next_tokens(logits, sampling, uniform.to(device).double())
        tokens = chosen.tolist()
        yield_row: list[int | None] = []
        for i, token in enumerate(tokens):
            ended[i] = ended[i] or token == end
            rows[i].append(token)
            yield_row.append(None if ended[i] else token)
        if all(ended):
            return
        yield yield_row
        fed = chosen[:, None]


def _padded(rows: list[list[int]], device: torch.device) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the prompt's tokens behind an end-of-text token, as every document begins."""
    return [tokenizer.end_of_text, *(int(i) for i in tokenizer.encode(prompt))]


def sample_texts(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    count: int,
    sampling: Sampling,
    *,
    seed: int,
) -> list[str]:
    """Return a continuation of each prompt, of at most `count` tokens, without the prompt."""
    was_training = model.training
    model.eval()
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    written: list[list[int]] = [[] for _ in prompts]
    for tokens in stream_tokens(
        model, encoded, count, sampling, seed=seed, end=tokenizer.end_of_text
    ):
        for row, token in zip(written, tokens, strict=True):
            if token is not None:
                row.append(token)
    model.train(was_training)
    return [tokenizer.decode(row) for row in written]


def generate(
    run: LoadedRun | str | Path,
    prompt: str | Sequence[str] = "",
    *,
    max_length: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[str]:
    """Return prompt and continuation of one or several prompts; `run` is loaded or a run folder."""
    loaded = run if isinstance(run, LoadedRun) else load_run(run)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    sampling = Sampling(temperature, top_k, top_p)
    texts = sample_texts(loaded.model, loaded.tokenizer, prompts, max_length, sampling, seed=seed)
    return [before + after for before, after in zip(prompts, texts, strict=True)]


class TextStream:
    """Decodes a growing list of tokens, holding back characters that are not complete yet."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def add(self, token: int) -> str:
        """Return the text that this token completes."""
        self._ids.append(token)
        return self._take(hold=True)

    def rest(self) -> str:
        """Return what is still held back."""
        return self._take(hold=False)

    def _take(self, hold: bool) -> str:
        text = self._tokenizer.decode(self._ids)
        if hold and text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new, self._shown = text[self._shown :], len(text)
        # The next tokens do not change how finished lines decode.
        if new.endswith("\n"):
            self._ids, self._shown = [], 0
        return new


def generate_command(
    *,
    run: Path | None,
    prompts: list[str],
    max_length: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    num_samples: int,
    output: Path | None,
    interactive: bool,
    checkpoint: str,
    device: str,
    precision: str,
) -> int:
    """Write texts to the terminal as they come, or to a file; return the exit code."""
    loaded = load_run(run, checkpoint=checkpoint, device=device, precision=precision)
    sampling = Sampling(temperature, top_k, top_p)
    seed = secrets.randbits(32) if seed is None else seed
    if interactive:
        for prompt in _asked():
            _stream(loaded, prompt, max_length, sampling, seed)
            seed += 1
        return EXIT_DONE
    wanted = [prompt for prompt in prompts for _ in range(num_samples)]
    if len(wanted) == 1 and output is None:
        _stream(loaded, wanted[0], max_length, sampling, seed)
        return EXIT_DONE
    texts = sample_texts(loaded.model, loaded.tokenizer, wanted, max_length, sampling, seed=seed)
    whole = "\n\n".join(prompt + text for prompt, text in zip(wanted, texts, strict=True))
    if output is None:
        for number, (prompt, text) in enumerate(zip(wanted, texts, strict=True), 1):
            print(f"--- {number}/{len(wanted)}\n{prompt}{text}")
    else:
        storage.write_atomic(output, whole + "\n")
        print(f"{len(wanted)} texts written to {output}")
    return EXIT_DONE


def _asked() -> Iterator[str]:
    """Ask for prompts until an empty line, the end of input or Ctrl-C."""
    while True:
        try:
            prompt = input("prompt> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not prompt:
            return
        yield prompt


def _stream(loaded: LoadedRun, prompt: str, count: int, sampling: Sampling, seed: int) -> None:
    """Print prompt and continuation, token by token."""
    print(prompt, end="", flush=True)
    text = TextStream(loaded.tokenizer)
    encoded = encode_prompt(loaded.tokenizer, prompt)
    tokens = stream_tokens(
        loaded.model, [encoded], count, sampling, seed=seed, end=loaded.tokenizer.end_of_text
    )
    for (token,) in tokens:
        if token is not None:
            print(text.add(token), end="", flush=True)
    print(text.rest(), flush=True)
