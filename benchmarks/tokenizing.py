"""BPE training and encoding in MB/s on the standard library's sources.

Training: `tokenizers` called directly, on documents in memory and on documents that it is handed as
they are read, against dtt's path. Encoding: `tokenizers` and `tiktoken` called alone in one thread
on documents in memory (and `tiktoken` by two processes: the most that a second core can bring),
against dtt's encoder alone, and all of `dtt tokenize` (read, encode, write, hash) with one and two
workers and a given tokenizer.json, and with three steps of cleaning (unicode, length, pii). MB are
10^6 bytes of UTF-8.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from table import (
    in_process,
    median,
    parser,
    print_heading,
    print_table,
    ratio,
    summarize,
    take_turns,
)

from dtt.config.data import Data, TokenizerFile
from dtt.config.sources import Stdlib, Text
from dtt.data.preparation.prepare import prepare
from dtt.data.sources import open_source
from dtt.tokenizer import parse_tokenizer, train_bpe

VOCABULARIES = {"16k": 16384, "50k": 50257}
CLEANING = ("unicode", {"name": "length", "min_characters": 20}, "pii")
SPECIAL = ["<|endoftext|>"]


def documents(source: Any) -> Iterator[str]:
    """Read the documents of a source, as dtt's training of a tokenizer does."""
    reader = open_source(source)
    for part in reader.parts(0.0):
        for document in reader.read(part):
            yield document.text


def source_settings(folder: str | None) -> Any:
    return Text(path=(folder,)) if folder else Stdlib()


def train_directly(texts: Iterable[str], vocabulary: int) -> str:
    """Train with `tokenizers` alone: the same settings as dtt's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def read_directly(settings: Any) -> Iterator[str]:
    """Read the documents of a source as a short script would."""
    files = open_source(settings).files
    for name in [file.name if isinstance(settings, Text) else file[0] for file in files]:
        with contextlib.suppress(UnicodeDecodeError):
            yield Path(name).read_text(encoding="utf-8")


def tiktoken_encoding(text: str) -> Any:
    """Return tiktoken's encoding with the merges of a byte-level tokenizer.json."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
    from tokenizers import pre_tokenizers

    # Each byte's printable stand-in, from `tokenizers` itself: bytes 128-255 occur in UTF-8 only
    # as parts of characters, so their names follow from GPT-2's rule.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {chr(b): b for b in printable}
    names |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in printable)}
    assert set(names) == set(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = json.loads(text)["model"]["vocab"]
    ranks = {
        bytes(names[char] for char in token): rank
        for token, rank in vocabulary.items()
        if token not in SPECIAL
    }
    return tiktoken.Encoding(
        "alone", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )


def work(spec: dict[str, Any]) -> dict[str, float]:
    """Measure one variant in this process and return its seconds."""
    import tiktoken  # noqa: F401  before the clock starts
    import tokenizers  # noqa: F401

    variant, settings = spec["variant"], source_settings(spec["source"])
    if variant.startswith("dtt tokenize"):
        return {"seconds": whole_tokenize(spec, settings)}
    if variant == "dtt, training":
        begin = time.perf_counter()
        train_bpe(documents(settings), spec["vocabulary"], SPECIAL).to_json()
        return {"seconds": time.perf_counter() - begin}
    if variant == "tokenizers, reading":
        begin = time.perf_counter()
        train_directly(read_directly(settings), spec["vocabulary"])
        return {"seconds": time.perf_counter() - begin}
    texts = list(documents(settings))
    if variant == "tokenizers, in memory":
        begin = time.perf_counter()
        train_directly(texts, spec["vocabulary"])
        return {"seconds": time.perf_counter() - begin}
    text = Path(spec["tokenizer"]).read_text(encoding="utf-8")
    if variant.startswith(("tiktoken", "dtt")):
        tiktoken_alone = tiktoken_encoding(text)
        whole = parse_tokenizer(text, spec["tokenizer"])
        whole.encode("what it makes when it is first used")
        ours = variant.startswith("dtt")

        def encode(some: list[str]) -> int:
            if ours:
                return sum(len(whole.encode(t)) for t in some)
            one = tiktoken_alone.encode_to_numpy
            return sum(len(one(t, disallowed_special=())) for t in some)

        begin = time.perf_counter()
        if variant.endswith("2 processes"):
            count = in_two_processes(encode, texts)
        else:
            count = encode(texts)
    else:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(text)
        begin = time.perf_counter()
        count = sum(len(tokenizer.encode(t).ids) for t in texts)
    return {"seconds": time.perf_counter() - begin, "tokens": count}


def in_two_processes(encode: Callable[[list[str]], int], texts: list[str]) -> int:
    """Encode half of the texts in each of two processes: the most that a second one can bring."""
    context = multiprocessing.get_context("fork")
    counts = context.SimpleQueue()
    processes = [
        context.Process(target=lambda half: counts.put(encode(half)), args=(texts[n::2],))
        for n in range(2)
    ]
    for process in processes:
        process.start()
    count = counts.get() + counts.get()
    for process in processes:
        process.join()
    return int(count)


def whole_tokenize(spec: dict[str, Any], settings: Any) -> float:
    """Return the seconds of what `dtt tokenize` does after its imports."""
    workers = int(spec["variant"].split()[2])
    cleaning = CLEANING if spec["variant"].endswith("cleaning") else ()
    folder = Path(tempfile.mkdtemp(prefix="dtt-tokenizing-"))
    try:
        begin = time.perf_counter()
        data = Data.model_validate(
            {"source": settings, "dir": folder, "workers": workers, "cleaning": cleaning}
        )
        prepare(data, TokenizerFile(path=Path(spec["tokenizer"])))
        return time.perf_counter() - begin
    finally:
        shutil.rmtree(folder)


def print_training(spec: dict[str, Any], size: float, rounds: int) -> None:
    """The training of a BPE, by `tokenizers` alone and by dtt."""

    def measure(variant: str) -> float:
        return size / float(in_process(__file__, {**spec, "variant": variant})["seconds"])

    found = take_turns(
        ["tokenizers, in memory", "tokenizers, reading", "dtt, training"], measure, rounds
    )
    first = median(found["tokenizers, reading"])
    rows = [[n, max(v), median(v), ratio(median(v), first)] for n, v in found.items()]
    print_table(["BPE training, MB/s", "best", "median", "to tokenizers, reading"], rows)
    summarize(
        "BPE training on stdlib, to tokenizers",
        ratio(median(found["dtt, training"]), first),
        "1.0x",
    )


def print_encoding(label: str, spec: dict[str, Any], size: float, rounds: int) -> None:
    """Encoding with one vocabulary: the encoders alone, and all of `dtt tokenize`."""
    tokens: dict[str, float] = {}

    def measure(variant: str) -> float:
        found = in_process(__file__, {**spec, "variant": variant})
        tokens[variant] = found.get("tokens", 0)
        return size / float(found["seconds"])

    alone = ["tokenizers alone", "tiktoken alone", "dtt alone", "tiktoken alone, 2 processes"]
    whole = [f"dtt tokenize {rest}" for rest in ("1 worker", "1 worker, cleaning", "2 workers")]
    found = take_turns([*alone, *whole], measure, rounds)
    assert len({tokens[name] for name in alone}) == 1, "the encoders give different tokens"
    best = max(median(found[name]) for name in alone[:2])
    two = {alone[3]: alone[1], whole[2]: whole[0]}
    rows = [
        [
            name,
            max(values),
            median(values),
            ratio(median(values), best),
            ratio(median(values), median(found[two[name]])) if name in two else "",
        ]
        for name, values in found.items()
    ]
    heads = [
        f"encoding, {label}, MB/s",
        "best",
        "median",
        "to the faster encoder",
        "to one, median",
    ]
    print_table(heads, rows)
    wanted_of = {"dtt alone": "1.0x", whole[0]: "0.8x", whole[1]: "0.7x", whole[2]: "reported"}
    for name, wanted in wanted_of.items():
        reached = ratio(median(found[name]), best)
        summarize(f"{label}: {name}, to the faster encoder alone", reached, wanted)
    reached = ratio(median(found[whole[2]]), median(found[whole[0]]))
    summarize(f"{label}: dtt tokenize, two workers to one", reached, "1.7x")


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
        return
    options = parser(__doc__).parse_args()
    quick, rounds = options.quick, options.rounds or (1 if options.quick else 5)
    with tempfile.TemporaryDirectory() as folder:
        source = small_source(Path(folder)) if quick else None
        texts = list(documents(source_settings(source)))
        size = sum(len(text.encode()) for text in texts) / 1e6
        print_heading("Tokenizing", options.threads, quick)
        print(f"{len(texts):,} documents, {size:.1f} MB\n")
        for label, vocabulary in ({"512": 512} if quick else VOCABULARIES).items():
            tokenizer = Path(folder) / f"{label}.json"
            tokenizer.write_text(train_directly(texts, vocabulary), encoding="utf-8")
            spec = {"source": source, "vocabulary": vocabulary, "tokenizer": str(tokenizer)}
            if vocabulary < 50_000:
                print_training(spec, size, rounds)
            print_encoding(label, spec, size, rounds)


def small_source(folder: Path) -> str:
    """Write a few short texts for --quick."""
    target = folder / "texts"
    target.mkdir()
    for number, text in enumerate(itertools.islice(documents(Stdlib()), 150)):
        (target / f"{number}.txt").write_text(text[:10_000], encoding="utf-8")
    return str(target)


if __name__ == "__main__":
    main()
