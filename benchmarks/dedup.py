"""Near-duplicates: documents per second, recall and precision against datatrove's own MinHash.

Both with words in n-grams of 5, 14 bands of 8 hashes, in one process, from documents in memory to
the documents that are left: signatures on disk, the decision, and the pass that leaves duplicates
out. datatrove (pip install "datatrove[processing]" spacy) splits words with spaCy's English rules.

The corpus is made: random documents by a Zipf law, half of them with one copy somewhere later in
which words were changed, deleted and added. For each pair the exact Jaccard similarity of the sets
of 5-grams is known, so the table shows the share of pairs found by similarity, beside the share
that theory promises of LSH. Recall counts pairs of at least 0.8, precision is the share of found
pairs of at least 0.7 (the knee of the curve is at 0.72). Pairs of unrelated documents have a
similarity of nearly 0; they are counted as wrongly removed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
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

from dtt.config.cleaning import NearDedup
from dtt.data.cleaning.reader import CleanedReader
from dtt.data.cleaning.scan import find_duplicates
from dtt.data.documents import Document, Part
from dtt.data.preparation.crew import Crew
from dtt.data.preparation.workers import LocalWorkers
from dtt.data.progress import silent

NGRAM, BANDS, ROWS = 5, 14, 8
BINS = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.01)
Pair = tuple[int, int, float]
"""Numbers of a document and its copy, and their exact similarity."""
PART = 1000
"""Documents that are read at a time."""
VOCABULARY = 20_000
VARIANTS = ("datatrove", "dtt, as datatrove", "dtt, similarity 0.7")


def make_corpus(count: int, seed: int = 0) -> tuple[list[str], list[Pair]]:
    """Return documents, and pairs (first, later, exact similarity) of which one is a copy."""
    source = random.Random(seed)
    words = [f"{source.choice('bcdfgklmnprst')}{n:x}" for n in range(VOCABULARY)]
    sums = list(accumulate(1 / (n + 10) for n in range(VOCABULARY)))
    texts: list[list[str]] = []
    waiting: list[int] = []
    pairs = []
    while len(texts) < count:
        if waiting and source.random() < 1 / 3:
            first = waiting.pop(source.randrange(len(waiting)))
            copy = _edited(texts[first], source.random() ** 2 * 0.15, source, words)
            pairs.append((first, len(texts), _jaccard(texts[first], copy)))
            texts.append(copy)
        else:
            length = int(source.lognormvariate(5.5, 0.7)) + 20
            if source.random() < 0.5:
                waiting.append(len(texts))
            texts.append(source.choices(words, cum_weights=sums, k=length))
    return [" ".join(text) for text in texts], pairs


def _edited(text: list[str], share: float, source: random.Random, words: list[str]) -> list[str]:
    copy: list[str] = []
    for word in text:
        kind = source.random() / share if share else 1.0
        if kind >= 2 / 3:
            copy.append(word)  # else it is deleted ...
        if 1 / 3 <= kind < 1.0:
            copy.append(source.choice(words))  # ... changed, or has a new one behind it
    return copy


def _jaccard(a: list[str], b: list[str]) -> float:
    one, two = (set(zip(*(text[n:] for n in range(NGRAM)), strict=False)) for text in (a, b))
    return len(one & two) / max(len(one | two), 1)


class InMemory:
    """Documents in memory as a source."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.bad: Counter[str] = Counter()

    def documents(self) -> int:
        return len(self.texts)

    def fingerprint(self) -> dict[str, Any]:
        return {"documents": len(self.texts)}

    def parts(self, tail: float) -> list[Part]:
        edges = range(0, len(self.texts), PART)
        return [Part(n, a, a + PART) for n, a in enumerate(edges)]

    def read(self, part: Part) -> Iterator[Document]:
        for text in self.texts[part.start : part.stop]:
            yield Document(text)


def by_dtt(texts: list[str], folder: Path, similarity: float | None) -> set[int]:
    """Return the numbers of the documents that are removed."""
    step = NearDedup(ngram=NGRAM, bands=BANDS, rows=ROWS, similarity=similarity)
    reader = CleanedReader(InMemory(texts), (step,), folder)
    parts = reader.parts(0.0)
    with Crew(folder) as crew:
        crew.meet("corpus", lambda: None)
        find_duplicates(reader, parts, crew, LocalWorkers(1), silent)
    kept: Counter[str] = Counter(d.text for part in parts for d in reader.read(part))
    return _removed(texts, kept)


def by_datatrove(texts: list[str], folder: Path) -> set[int]:
    """Return the numbers of the documents that datatrove's four stages remove."""
    from datatrove.data import Document as Theirs
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )
    from loguru import logger

    logger.remove()
    config = MinhashConfig(n_grams=NGRAM, num_buckets=BANDS, hashes_per_bucket=ROWS)
    places = [str(folder / name) for name in ("signatures", "buckets", "removed")]
    documents = [Theirs(text=text, id=str(n)) for n, text in enumerate(texts)]
    MinhashDedupSignature(places[0], config).run(iter(documents), 0, 1)
    for rank in range(BANDS):
        MinhashDedupBuckets(places[0], places[1], config=config).run(None, rank, BANDS)
    MinhashDedupCluster(places[1], places[2], config=config).run(None, 0, 1)
    kept = MinhashDedupFilter(places[2]).run(iter(documents), 0, 1)
    return set(range(len(texts))) - {int(document.id) for document in kept}


def _removed(texts: list[str], kept: Counter[str]) -> set[int]:
    removed = set()
    for number, text in enumerate(texts):
        kept[text] -= 1
        if kept[text] < 0:
            removed.add(number)
    return removed


def work(spec: dict[str, Any]) -> dict[str, Any]:
    """Run one variant in this process: its seconds, and what it removed."""
    texts, _ = make_corpus(spec["documents"])
    variants = {
        "datatrove": by_datatrove,
        "dtt, as datatrove": lambda t, f: by_dtt(t, f, None),
        "dtt, similarity 0.7": lambda t, f: by_dtt(t, f, 0.7),
    }
    run = variants[spec["variant"]]
    with tempfile.TemporaryDirectory() as warm, contextlib.redirect_stdout(io.StringIO()):
        run(texts[:20], Path(warm))  # imports and models are not what is compared
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        begin = time.perf_counter()
        removed = run(texts, Path(folder))
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "removed": sorted(removed)}


def promised(similarity: float) -> float:
    """Return the share of pairs of this similarity that LSH finds."""
    return 1 - (1 - similarity**ROWS) ** BANDS


def by_similarity(pairs: list[Pair], value: Callable[[Pair], float]) -> list[float | None]:
    """Return the mean of a value of the pairs, in each bin of similarity."""
    means: list[float | None] = []
    for low, high in pairwise(BINS):
        inside = [value(pair) for pair in pairs if low <= pair[2] < high]
        means.append(sum(inside) / len(inside) if inside else None)
    return means


def quality(pairs: list[Pair], removed: set[int]) -> list[float | int]:
    """Return recall, precision, and how many documents without a copy were removed."""
    hits = [(s, bool({a, b} & removed)) for a, b, s in pairs]
    alike = [hit for s, hit in hits if s >= 0.8]
    right = [s >= 0.7 for s, hit in hits if hit]
    alone = removed - {n for a, b, _ in pairs for n in (a, b)}
    correct = sum(right) / max(len(right) + len(alone), 1)
    return [sum(alike) / max(len(alike), 1), correct, len(alone)]


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
        return
    options = parser(__doc__)
    options.add_argument("--documents", type=int, help="documents of the corpus (default: 20000)")
    given = options.parse_args()
    count = given.documents or (300 if given.quick else 20_000)
    variants = [
        name
        for name in VARIANTS
        if name != "datatrove" or importlib.util.find_spec("datatrove") is not None
    ]
    texts, pairs = make_corpus(count)
    removed: dict[str, set[int]] = {}

    def measure(variant: str) -> float:
        found = in_process(__file__, {"variant": variant, "documents": count})
        removed[variant] = set(found["removed"])
        return count / float(found["seconds"])

    print_heading("Near-duplicates", given.threads, given.quick)
    size = sum(map(len, texts)) / 1e6
    print(f"{count:,} documents, {size:.1f} MB, {len(pairs):,} pairs of a text and its copy\n")
    speeds = take_turns(variants, measure, given.rounds or (1 if given.quick else 3))
    first = median(speeds[variants[0]])
    rows = []
    for name in variants:
        speed = median(speeds[name])
        rows.append([name, speed, ratio(speed, first), *quality(pairs, removed[name])])
    heads = ["variant", "documents/s", f"to {variants[0]}", "recall", "precision", "wrong"]
    print_table(heads, rows)
    for name, _, faster, recall, precision, _ in rows[1:] if variants[0] == "datatrove" else rows:
        what = f"MinHash, {name}: documents/s to {variants[0]}; recall; precision"
        summarize(what, f"{faster}; {recall:.3f}; {precision:.3f}")
    columns = [
        [f"{low:.2f} to {min(high, 1.0):.2f}" for low, high in pairwise(BINS)],
        by_similarity(pairs, lambda pair: promised(pair[2])),
        *(
            by_similarity(
                pairs, lambda pair, out=removed[name]: float(not out.isdisjoint(pair[:2]))
            )
            for name in variants
        ),
    ]
    print_table(["similarity", "promised by LSH", *variants], zip(*columns, strict=True))


if __name__ == "__main__":
    main()
