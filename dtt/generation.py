"""Text from a model: batched prompts, a cache of keys and values, tokens as they come."""

from __future__ import annotations

import io
import secrets
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dtt import storage
from dtt.data.progress import Advance, progress, silent
from dtt.errors import EXIT_DONE
from dtt.model.language_model import LanguageModel, Memory
from dtt.tokenizer import Tokenizer
from dtt.training.load import LoadedRun, load_run


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its distribution."""

    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_k: int | None = None
    top_p: float | None = None


GREEDY_BELOW = 1e-6
"""Temperatures from here down mean the likeliest token: dividing by them would overflow."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BOLD, DIM = "\x1b[1m", "\x1b[2m"
CONTROLS = {code: REPLACEMENT for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
"""What would move the cursor or change a terminal, all but tab and new line."""


def next_tokens(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Choose one token per row of logits [B, V], by inverting the distribution at `uniform` [B].

    top_k keeps the k likeliest; top_p then the smallest set of the likeliest that together have at
    least that probability (Holtzman et al. 2019). Each row depends on its own number only.
    """
    if sampling.temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    # All of the probability is not a sum to compare with: rounding would drop the rarest tokens.
    top_p = None if sampling.top_p == 1 else sampling.top_p
    order = None
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits, order = logits.topk(sampling.top_k)
    elif top_p is not None:
        logits, order = logits.sort(descending=True)
    weights = torch.softmax(logits, -1).double()
    if top_p is not None:
        # A token stays if those before it do not yet have the probability.
        weights = weights * (weights.cumsum(-1) - weights < top_p)
    totals = weights.cumsum(-1)
    chosen = torch.searchsorted(totals, uniform[:, None] * totals[:, -1:], right=True)
    chosen = chosen.clamp(max=totals.shape[-1] - 1)
    return (chosen if order is None else order.gather(-1, chosen)).squeeze(-1)


@torch.inference_mode()
def stream_tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    count: int,
    sampling: Sampling,
    *,
    seed: int,
    end: int,
    vocab_size: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt, `count` times or until all have met `end`.

    Prompts have at least one token; tokens from `vocab_size` on are never chosen. None stands for a
    row that has ended. Row i draws from its own stream of (seed + i), so its text does not depend
    on the other rows. When a row fills the context, the newest half of it is read again, and
    generation goes on.
    """
    device, limit = model.head_weight.device, model.settings.context
    rows = [list(prompt)[-limit:] for prompt in prompts]
    draws = [torch.Generator().manual_seed(seed + i) for i in range(len(rows))]
    ended = [False] * len(rows)
    cache: Memory | None = None
    for step in range(count):
        if cache is None or cache.length == limit:
            # Each row by its own length, so that neighbours do not matter; an ended one is idle.
            rows = [
                _window(row[-1:] if e else row, limit) for row, e in zip(rows, ended, strict=True)
            ]
            fed = _padded(rows, device)
            longest = fed.shape[1]
            padding = torch.tensor([longest - len(row) for row in rows], device=device)
            capacity = min(limit, longest + count - step)
            cache = model.memory(padding, capacity)
        logits = model.next_logits(fed, cache)[:, :vocab_size]
        if sampling.temperature < GREEDY_BELOW:
            chosen = logits.argmax(-1)
        else:
            drawn = [torch.rand((), generator=g, dtype=torch.float64) for g in draws]
            chosen = next_tokens(logits, sampling, torch.stack(drawn).to(device))
        tokens: list[int | None] = []
        for i, token in enumerate(chosen.tolist()):
            ended[i] = ended[i] or token == end
            rows[i].append(token)
            tokens.append(None if ended[i] else token)
        if all(ended):
            return
        yield tokens
        fed = chosen[:, None]


def _window(row: list[int], limit: int) -> list[int]:
    return row if len(row) <= limit else row[-max(1, limit // 2) :]


def _padded(rows: list[list[int]], device: torch.device) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the prompt's tokens behind an end-of-text token, as every document begins.

    Bytes of a command line that are not UTF-8, which Python hands on as lone surrogates, are read
    as replacement characters.
    """
    text = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return [tokenizer.end_of_text, *(int(i) for i in tokenizer.encode(text))]


def sample_texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    count: int,
    sampling: Sampling,
    *,
    seed: int,
    advance: Advance = silent,
) -> list[str]:
    """Return a continuation of each prompt, of at most `count` tokens, without the prompt."""
    if not prompts:
        return []
    was_training = model.training
    model.eval()
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    written: list[list[int]] = [[] for _ in prompts]
    stream = stream_tokens(
        model,
        encoded,
        count,
        sampling,
        seed=seed,
        end=tokenizer.end_of_text,
        vocab_size=tokenizer.vocab_size,
    )
    try:
        for done, tokens in enumerate(stream, 1):
            advance("writing", done, count)
            for row, token in zip(written, tokens, strict=True):
                if token is not None:
                    row.append(token)
    finally:
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
    """Decodes a growing list of tokens, holding back characters that are not complete yet.

    Also right where decoding depends on the tokens before (a leading space that is dropped, bytes
    that are a character only together): the text so far is decoded anew with each token, from a
    point that is known to make no difference.
    """

    RESTART_AFTER, KEPT = 64, 8

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def add(self, token: int) -> str:
        """Return the text that this token completes."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        new = self._take(text.rstrip(REPLACEMENT))
        if len(self._ids) >= self.RESTART_AFTER:
            tail = self._tokenizer.decode(self._ids[-self.KEPT :])
            if self._shown == len(text) and text.endswith(tail) and REPLACEMENT not in tail:
                self._ids, self._shown = self._ids[-self.KEPT :], len(tail)
        return new

    def rest(self) -> str:
        """Return what is still held back."""
        return self._take(self._tokenizer.decode(self._ids))

    def _take(self, text: str) -> str:
        new = text[self._shown :]
        self._shown += len(new)
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
    # What a terminal's encoding lacks must not end the text.
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if interactive:
        _converse(loaded, max_length, sampling, seed, num_samples)
        return EXIT_DONE
    warn_about_prompts(loaded, prompts)
    wanted = [prompt for prompt in prompts for _ in range(num_samples)]
    if output is None:
        _show(loaded, wanted, max_length, sampling, seed)
        return EXIT_DONE
    with progress() as advance:
        texts = sample_texts(
            loaded.model,
            loaded.tokenizer,
            wanted,
            max_length,
            sampling,
            seed=seed,
            advance=advance,
        )
    whole = "\n\n".join(prompt + text for prompt, text in zip(wanted, texts, strict=True))
    storage.write_atomic(output, (whole + "\n").encode("utf-8", "replace"))
    print(f"{len(wanted)} text{'s' * (len(wanted) > 1)} written to {output}")
    return EXIT_DONE


def warn_about_prompts(loaded: LoadedRun, prompts: Sequence[str]) -> None:
    """Say on stderr what the model will not see as it is written: unknown and too early text."""
    tokenizer, context = loaded.tokenizer, loaded.model.settings.context
    lacking: Counter[str] = Counter()
    if tokenizer.unknown is not None:
        for char, count in Counter("".join(prompts)).items():
            if tokenizer.unknown in tokenizer.encode(char):
                lacking[char] = count
    if lacking:
        total, most = sum(lacking.values()), [char for char, _ in lacking.most_common(5)]
        which = " ".join(map(repr, most)) + (" ..." if len(lacking) > len(most) else "")
        plural = "character" if total == 1 else "characters"
        _warn(
            f"the run's tokenizer does not know {total} {plural} of the prompt: {which}; "
            "the model reads a placeholder there"
        )
    longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts)
    if longest > context:
        _warn(f"the prompt has {longest} tokens; the model sees only the last {context} of them")


def _warn(text: str) -> None:
    print(f"dtt: warning: {text}", file=sys.stderr, flush=True)


def _show(loaded: LoadedRun, prompts: list[str], count: int, sampling: Sampling, seed: int) -> None:
    """Print one text as it comes; several, which are computed together, one below the other."""
    if len(prompts) == 1:
        _stream(loaded, prompts[0], count, sampling, seed)
        return
    with progress() as advance:
        texts = sample_texts(
            loaded.model, loaded.tokenizer, prompts, count, sampling, seed=seed, advance=advance
        )
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
        gap = "\n" if number > 1 else ""
        print(f"{gap}{_styled(f'--- {number}/{len(prompts)}', DIM)}")
        print(_styled(prompt, BOLD) + _printable(text))


def _converse(
    loaded: LoadedRun, count: int, sampling: Sampling, seed: int, num_samples: int
) -> None:
    """Ask for prompts and continue them until an empty line, the end of input or Ctrl-C.

    Ctrl-C within a text ends that text only.
    """
    while True:
        try:
            prompt = input("prompt> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            if sys.stdin.isatty():
                print()
            return
        if not prompt:
            return
        warn_about_prompts(loaded, [prompt])
        try:
            _show(loaded, [prompt] * num_samples, count, sampling, seed)
        except KeyboardInterrupt:
            print()
        print()
        seed += num_samples


def _stream(loaded: LoadedRun, prompt: str, count: int, sampling: Sampling, seed: int) -> None:
    """Print prompt and continuation, token by token."""
    print(_styled(prompt, BOLD), end="", flush=True)
    text = TextStream(loaded.tokenizer)
    tokens = stream_tokens(
        loaded.model,
        [encode_prompt(loaded.tokenizer, prompt)],
        count,
        sampling,
        seed=seed,
        end=loaded.tokenizer.end_of_text,
        vocab_size=loaded.tokenizer.vocab_size,
    )
    for (token,) in tokens:
        if token is not None:
            print(_printable(text.add(token)), end="", flush=True)
    print(_printable(text.rest()), flush=True)


def _styled(text: str, style: str) -> str:
    return f"{style}{_printable(text)}\x1b[0m" if text and sys.stdout.isatty() else text


def _printable(text: str) -> str:
    """On a terminal, take from a text the characters that would control it."""
    return text.translate(CONTROLS) if sys.stdout.isatty() else text
