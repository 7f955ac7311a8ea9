"""Looking at prepared data: documents, windows and search, read from the tokens themselves.

What is shown is what training reads. Memory does not depend on the corpus's size.
"""

from __future__ import annotations

import codecs
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dtt.data.inspection.location import Found, find_corpora
from dtt.data.inspection.scanning import Scan
from dtt.data.inspection.token_text import END, JoinedText, printable, token_bytes, token_texts
from dtt.data.packing import PackedWindows, choose_packing
from dtt.data.preparation.prepare import Corpus
from dtt.data.shards import DocumentIndex
from dtt.data.windows import IGNORED, ContiguousWindows, Windows
from dtt.errors import EXIT_DONE, ConfigError

BLOCK = 1 << 18
"""Tokens that are read at a time."""
AROUND = 48
"""Bytes of text shown on either side of a match."""
PREVIEW = 200
"""Tokens of a document that its preview is made of."""
COLOURS = ("\033[30;46m", "\033[30;47m")
MATCH, OFF = "\033[1;7m", "\033[0m"
END_NAME = "<|endoftext|>"


@dataclass(frozen=True)
class Match:
    """A place where a text was found: in document `number`, with the text around it."""

    number: int
    before: str
    text: str
    behind: str


class Look:
    """A split of a corpus, for people to look at."""

    def __init__(self, corpus: Corpus, split: str) -> None:
        self.corpus, self.split, self.tokenizer = corpus, split, corpus.tokenizer
        self.stream = corpus.stream(split)
        self.index = DocumentIndex(corpus.folder, corpus.manifest, split)
        pieces = token_bytes(corpus.tokenizer)
        self._joined = JoinedText(pieces, corpus.tokenizer.end_of_text) if pieces else None

    def bounds(self, number: int) -> tuple[int, int]:
        """Return the stream positions of a document's text, without its end."""
        if number >= len(self.index):
            raise ConfigError(
                f"--document {number}: the {self.split} split has {len(self.index):,} documents",
                f"give a number from 0 to {len(self.index) - 1}",
            )
        start, stop = self.index.bounds(number)
        return start, stop - (int(self.stream.read(stop - 1, 1)[0]) == self.tokenizer.end_of_text)

    def document(self, number: int) -> Iterator[str]:
        """Yield the text of a document in pieces."""
        if self._joined is None:
            yield self.tokenizer.decode(self.tokens(number))
            return
        start, stop = self.bounds(number)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for place in range(start, stop, BLOCK):
            ids = self.stream.read(place, min(BLOCK, stop - place))
            yield decoder.decode(self._joined.join(ids)[0])
        yield decoder.decode(b"", final=True)

    def tokens(self, number: int) -> list[int]:
        """Return the tokens of a document's text."""
        start, stop = self.bounds(number)
        return self.stream.read(start, stop - start).tolist()

    def preview(self, number: int) -> str:
        """Return the beginning of a document on one line."""
        start, stop = self.bounds(number)
        ids = self.stream.read(start, min(PREVIEW, stop - start)).tolist()
        return " ".join(self.tokenizer.decode(ids).split())

    def window(self, number: int, windows: Windows) -> list[list[int]]:
        """Return the pieces of a window: the inputs of each, and the last one's target."""
        if number >= windows.count:
            raise ConfigError(
                f"--window {number}: the {self.split} split has {windows.count:,} windows "
                f"of {windows.context} tokens",
                f"give a number from 0 to {windows.count - 1}",
            )
        tokens = np.zeros(windows.context, np.int64)
        targets = np.full(windows.context, IGNORED, np.int64)
        places = windows.fill(number, 0, tokens, targets)
        size = int((targets != IGNORED).sum())
        return [[*tokens[a:b].tolist(), int(targets[b - 1])] for a, b in pairwise([*places, size])]

    def text(self, ids: list[int]) -> str:
        """Return the text of tokens; the ends of documents in it are named."""
        parts: list[list[int]] = [[]]
        for token in ids:
            if token == self.tokenizer.end_of_text:
                parts.append([])
            else:
                parts[-1].append(token)
        return END_NAME.join(map(self.tokenizer.decode, parts))

    def texts(self, ids: list[int]) -> Iterator[str]:
        """Yield the text of each token; the end of a document is named."""
        for token, text in zip(ids, token_texts(self.tokenizer, ids), strict=True):
            yield END_NAME if token == self.tokenizer.end_of_text else text

    def search(self, text: str) -> Iterator[Match]:
        """Yield every place where `text` occurs, in order, those that overlap too."""
        wanted = text.encode("utf-8", "replace")
        if not wanted:
            raise ConfigError("--search: the text is empty", "give some text to look for")
        for block in self._blocks(len(wanted)) if self._joined else self._documents():
            found = block.data.find(wanted, block.first)
            while 0 <= found < block.last:
                stop = found + len(wanted)
                before = block.data[max(0, found - AROUND) : found].rpartition(END)[2]
                behind = block.data[stop : stop + AROUND].partition(END)[0]
                yield Match(block.document(found), _text(before), text, _text(behind))
                found = block.data.find(wanted, found + 1)

    def _blocks(self, longest: int) -> Iterator[_Block]:
        """Yield the split's text in blocks, with what is around them."""
        assert self._joined is not None
        scan = Scan(self.corpus, self.split)
        for start in range(1, len(scan), BLOCK):
            # A token of text has at least one byte.
            low = max(1, start - AROUND)
            data, stops = self._joined.join(scan.read(low, start - low + BLOCK + longest + AROUND))
            edges = np.concatenate([np.zeros(1, np.int64), stops])
            first, last = start - low, min(start - low + BLOCK, len(stops))
            yield _Block(data, int(edges[first]), int(edges[last]), self.index, stops, low)

    def _documents(self) -> Iterator[_Block]:
        """Yield the documents, where a token's text depends on its neighbours."""
        for number in range(len(self.index)):
            data = "".join(self.document(number)).encode("utf-8", "replace")
            start = self.index.bounds(number)[0]
            yield _Block(data, 0, len(data), self.index, np.array([len(data)]), start)


@dataclass(frozen=True)
class _Block:
    """Text in which matches that begin at bytes [first, last) are looked for."""

    data: bytes
    first: int
    last: int
    index: DocumentIndex
    stops: NDArray[np.int64]
    start: int

    def document(self, offset: int) -> int:
        """Return the number of the document that a byte is in."""
        return self.index.at(self.start + int(np.searchsorted(self.stops, offset, "right")))


def _text(part: bytes) -> str:
    """The whole characters of a part cut out of a text."""
    return part.decode("utf-8", "ignore")


def write_tokens(texts: Iterable[str], coloured: bool) -> Iterator[str]:
    """Yield texts of tokens so that their boundaries show: in alternating colours, or with |."""
    for place, text in enumerate(texts):
        if not coloured:
            yield ("|" if place else "") + text
            continue
        # A background would otherwise run to the end of the terminal's line.
        colour = COLOURS[place % 2]
        yield colour + text.replace("\n", f"\u23ce{OFF}\n{colour}") + OFF


def show_command(
    *,
    name: str,
    split: str,
    source: str | None,
    document: int | None,
    window: int | None,
    search: str | None,
    context: int | None,
    tokens: bool,
    limit: int,
) -> int:
    """Print what was asked for, and what it is on stderr; return the exit code."""
    found = find_corpora(name)
    look = Look(found.corpus(source), split)
    look.corpus.verify(split)
    terminal = sys.stdout.isatty()
    colour = terminal and "NO_COLOR" not in os.environ
    if search is not None:
        return _show_matches(look, search, limit, colour)
    parts: list[Iterable[str]]
    if window is not None:
        windows = _windows(found, look, context)
        pieces = look.window(window, windows)
        title = f"window {window} of {windows.count:,}, {windows.context} tokens each"
        parts = [look.texts(ids) if tokens else [look.text(ids)] for ids in pieces]
    elif document is not None:
        start, stop = look.bounds(document)
        title = f"document {document} of {len(look.index):,}: {stop - start:,} tokens"
        parts = [look.texts(look.tokens(document)) if tokens else look.document(document)]
    else:
        return _show_previews(look, limit)
    print(f"{look.corpus.folder}, {split}, {title}", file=sys.stderr)
    for place, part in enumerate(parts):
        if place:
            print(f"--- piece {place + 1} of {len(parts)}")
        # A terminal would act on control characters; a file gets the text as it is.
        shown = map(printable, part) if terminal else part
        for piece in write_tokens(shown, colour) if tokens else shown:
            print(piece, end="")
        print()
    return EXIT_DONE


def _windows(found: Found, look: Look, context: int | None) -> Windows:
    """Windows as the run that was named cuts them; of a corpus alone, one after another."""
    if found.config is None:
        if context is None:
            raise ConfigError("--window needs the length of windows", "give --context T, or a run")
        return ContiguousWindows(look.stream, context, 0)
    width = context or found.config.model.context
    if choose_packing(found.config.data.packing, look.corpus.manifest, width) == "best-fit":
        return PackedWindows(look.stream, width)
    return ContiguousWindows(look.stream, width, found.config.seed)


def _show_previews(look: Look, limit: int) -> int:
    """Print the beginnings of documents that are spread evenly over the split."""
    count, manifest = len(look.index), look.corpus.manifest
    size = manifest.total(look.split, "bytes")
    print(
        f"{look.corpus.folder}, {look.split}: {count:,} documents, "
        f"{len(look.stream) - 1:,} tokens, {size:,} bytes",
        file=sys.stderr,
    )
    print(f"{'document':>9} {'tokens':>9}  beginning")
    shown = min(limit, count)
    width = shutil.get_terminal_size().columns
    for number in sorted({count * i // shown for i in range(shown)} if shown else ()):
        start, stop = look.index.bounds(number)
        line = f"{number:>9} {stop - start:>9,}  {printable(look.preview(number))}"
        print(line[: width - 1])
    return EXIT_DONE


def _show_matches(look: Look, text: str, limit: int, colour: bool) -> int:
    mark, off = (MATCH, OFF) if colour else ("", "")
    count = 0
    for match in look.search(text):
        if count == limit:
            print(f"the first {limit}; more with --limit N", file=sys.stderr)
            return EXIT_DONE
        count += 1
        before, middle, behind = (
            printable(part).replace("\n", "\u23ce")
            for part in (match.before, match.text, match.behind)
        )
        print(f"{match.number:>9}  {before}{mark}{middle}{off}{behind}")
    found = f"{count:,} found" if count else "not found"
    print(f"{found} in {len(look.index):,} documents of the {look.split} split", file=sys.stderr)
    return EXIT_DONE
