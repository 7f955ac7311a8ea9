"""Sharing the work of `dtt tokenize`, and training a BPE on a gigabyte.

Sharing: the whole command (start, read, encode, write, hash) with a given tokenizer.json, by one
process and by two, by one rank of mpirun and by two, of one worker each; and by Dask. The bytes
that they write are compared. Training: `tokenizers` called alone on documents that it reads as it
goes, against dtt's path (choose a sample, cut long runs, train), each in a process of its own. MB
are 10^6 bytes. The text is the standard library again and again, with noise in its words, so that
no two copies are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memory import peak_memory

from dtt.config.data import Bpe, Data
from dtt.config.sources import Stdlib, Text
from dtt.data.preparation.prepare import plan_corpus
from dtt.data.preparation.sample import train_tokenizer
from dtt.data.preparation.workers import LocalWorkers
from dtt.data.sources import open_source
from dtt.tokenizer import train_bpe

SPECIAL = ("<|endoftext|>",)
SEPARATOR = "\x1e"
SHARED, TRAINED = 200_000_000, 1_000_000_000
VOCABULARY = 16384
NOISE = 0.02
"""Share of the words that are changed in each copy."""


def write_text(path: Path, size: int) -> None:
    """Write `size` bytes of documents with a separator behind each."""
    reader, draw = open_source(Stdlib()), random.Random(0)
    texts = [d.text for part in reader.parts(0.0) for d in reader.read(part)]
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            for text in texts:
                if file.tell() >= size:
                    break
                words = text.replace(SEPARATOR, " ").split(" ")
                for _ in range(int(NOISE * len(words))):
                    words[draw.randrange(len(words))] += f"{draw.getrandbits(20):x}"
                file.write(" ".join(words) + SEPARATOR)


def source_of(path: str) -> Text:
    return Text(path=(path,), separator=SEPARATOR)


def documents(path: str) -> Iterator[str]:
    """Read the documents without dtt."""
    rest = ""
    with open(path, encoding="utf-8") as file:
        while block := file.read(1 << 20):
            *texts, rest = (rest + block).split(SEPARATOR)
            yield from texts


def work(spec: dict[str, Any]) -> dict[str, float]:
    """Train in this process; return seconds and the peak of memory in MB."""
    data = Data(source=source_of(spec["text"]), dir=Path(spec["folder"]), val_fraction=1e-6)
    begin = time.perf_counter()
    if spec["variant"] == "tokenizers alone":
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        alone = Tokenizer(models.BPE())
        alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=spec["vocabulary"],
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        alone.train_from_iterator(documents(spec["text"]), trainer)
    else:
        settings = Bpe(vocab_size=spec["vocabulary"], train_bytes=spec["bytes"])
        plan = plan_corpus(data, settings)
        train_tokenizer(
            plan.source,
            settings,
            plan.parts,
            val_fraction=data.val_fraction,
            workers=LocalWorkers(),
            scratch=data.dir,
        )
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "megabytes": peak_memory() / 1e6}


def share(variant: str, text: Path, tokenizer: Path, digests: set[str]) -> float:
    """Return the seconds of a whole `dtt tokenize`."""
    how, count = variant.rsplit(" ", 1)
    folder = Path(tempfile.mkdtemp(prefix="dtt-crew-"))
    command = [sys.executable, "-m", "dtt", "tokenize", "--data-path", str(text)]
    command += ["--data.source.separator", SEPARATOR, "--data.dir", str(folder)]
    command += ["--tokenizer.name", "file", "--tokenizer.path", str(tokenizer)]
    if how == "mpirun -n":
        command = [mpirun() or "", "-n", count, *command, "--data.workers", "1"]
    else:
        command += ["--data.workers", count, *(["--dask", "local"] if how == "dask" else [])]
    try:
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begin
        digest, (made,) = hashlib.sha256(), (p for p in folder.iterdir() if p.name[0] != ".")
        for file in sorted(made.iterdir()):
            digest.update(file.read_bytes())
        digests.add(digest.hexdigest())
        return seconds
    finally:
        shutil.rmtree(folder)


def mpirun() -> str | None:
    return shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def print_sharing(folder: Path, quick: bool, rounds: int) -> None:
    from table import median, print_table, ratio, summarize, take_turns

    text, size = folder / "shared.txt", 12_000_000 if quick else SHARED
    write_text(text, size)
    tokenizer, digests = folder / "tokenizer.json", set[str]()
    first = (t for t, _ in zip(documents(str(text)), range(400), strict=False))
    tokenizer.write_text(train_bpe(first, 512 if quick else VOCABULARY, SPECIAL).to_json())
    pairs = [("processes 1", "processes 2")]
    if mpirun():
        pairs.append(("mpirun -n 1", "mpirun -n 2"))
    try:
        import distributed  # noqa: F401

        pairs.append(("dask 1", "dask 2"))
    except ModuleNotFoundError:
        pass
    names = [name for pair in pairs for name in pair]
    found = take_turns(
        names, lambda name: size / 1e6 / share(name, text, tokenizer, digests), rounds
    )
    assert len(digests) == 1, "the bytes are not the same"
    one = {second: median(found[first]) for first, second in pairs}
    rows = [[n, max(v), median(v), ratio(median(v), one.get(n))] for n, v in found.items()]
    print_table(["sharing", "MB/s, best", "median", "to one"], rows)
    for name, alone in one.items():
        wanted = "reported" if name.startswith("dask") else "1.8x"
        summarize(f"{name}, to one, same bytes", ratio(median(found[name]), alone), wanted)


def print_training(folder: Path, quick: bool, rounds: int) -> None:
    from table import in_process, median, note, print_table, ratio, summarize

    text, size = folder / "trained.txt", 3_000_000 if quick else TRAINED
    note("writing the text")
    write_text(text, size)
    spec = {"text": str(text), "folder": str(folder), "vocabulary": 512 if quick else VOCABULARY}
    # The whole text, and the size that is the default.
    variants = {
        "tokenizers alone": 0,
        "dtt, all of it": 2_000_000_000,
        "dtt, a sample of a tenth": size // 10,
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, most in variants.items():
            figures = in_process(__file__, spec | {"variant": name, "bytes": most})
            found[name].append(figures)
            note(f"{name}: {figures['seconds']:.1f} s, {figures['megabytes']:.0f} MB")
    rows, first = [], 0.0
    for name, all_figures in found.items():
        seconds = median(f["seconds"] for f in all_figures)
        first = first or seconds
        peak = max(f["megabytes"] for f in all_figures)
        rows.append([name, seconds, ratio(seconds, first), peak])
    print_table([f"BPE on {size / 1e6:,.0f} MB", "seconds", "to tokenizers", "peak MB"], rows)
    for (name, _, reached, peak), wanted in zip(rows[1:], ("1.2x", "reported"), strict=True):
        what = f"BPE on {size / 1e6:,.0f} MB, {name}: time to tokenizers"
        summarize(what, f"{reached}, {peak:,.0f} MB", wanted)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
        return
    from table import parser, print_heading  # it loads torch, which would count as memory

    options = parser(__doc__).parse_args()
    quick = options.quick
    print_heading("Sharing the work, and training on a gigabyte", options.threads, quick)
    with tempfile.TemporaryDirectory() as folder:
        print_sharing(Path(folder), quick, options.rounds or (1 if quick else 3))
        print_training(Path(folder), quick, options.rounds or 1)


if __name__ == "__main__":
    main()
