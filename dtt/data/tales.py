"""Short children's stories from a seeded grammar whose every probability is known.

A model cannot compress these stories below the entropy of the grammar that writes them, so
`Tale.bits` gives a training run the one number that real text never has: the loss of a perfect
model. `bits` computes that number from the text alone, and thereby says whether a story that a
model wrote is in the grammar.

The writer and the reader are one walk of one grammar (`dtt.data.tales_grammar`): a chooser takes
the option at each choice, `_Writer` by the digits of a pseudo-random integer, `_Reader` by the text
ahead. As the options of every choice differ before either's first fixed text ends, a text has at
most one derivation, whose probability is therefore that of the text.

A story has about 560 bytes and 168 bits, which is 0.30 bits per byte, in some 440 distinct words.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import NamedTuple, Protocol, TypeAlias

from dtt.data.tales_grammar import RULES, START

END = "\0"
"""Stands for the end of a story, where a choice depends on whether more text follows."""

_REFERENCE = re.compile(r"<(?:([\w.]+)=)?([\w.{}]+)((?:-[\w.]+)*)>")
_VARIABLE = re.compile(r"\{([\w.]+)\}")


@dataclass(frozen=True)
class Tale:
    """A story, and `bits` = -log2 of its probability, its ending where it ends included."""

    text: str
    bits: float


class Slot(NamedTuple):
    """A choice that earlier ones decide: its rule names, or it leaves out, what they bound."""

    variable: str
    rule: str
    without: tuple[str, ...]


class Branch(NamedTuple):
    """An option of a choice: what it writes (last piece first), what it binds, what it costs."""

    pieces: tuple[Piece, ...]
    binds: dict[str, str]
    bits: float


class Choice(NamedTuple):
    """Options to choose among; `ladder` holds each as many times as its weight."""

    branches: tuple[Branch, ...]
    ladder: tuple[Branch, ...]


Piece: TypeAlias = "str | Choice | Slot"


class Option(NamedTuple):
    """A line of a rule."""

    weight: int
    text: str
    values: dict[str, str]


class Chooser(Protocol):
    """What makes a walk of the grammar into a writer, a reader or a check of the grammar."""

    bound: dict[str, str]

    def literal(self, template: str, /) -> None:
        """Pass over a fixed text, which may name bound variables."""

    def pick(self, choice: Choice, rest: Sequence[Piece], /) -> Branch:
        """Take a branch of `choice`; `rest` follows it (last piece first)."""


class Grammar:
    """A grammar ready to walk, compiled from rules as `dtt.data.tales_grammar` describes them.

    Rules are compiled as the walks meet them, so that making a grammar costs next to nothing. A
    rule that refers to itself, or to one that does not exist, is an error in the grammar
    (RecursionError, KeyError).
    """

    def __init__(self, rules: Mapping[str, str], start: str) -> None:
        self._rules = rules
        self._start = start
        self._choices: dict[tuple[str, ...], Choice] = {}

    def walk(self, chooser: Chooser) -> float:
        """Walk one story through `chooser`; -log2 of the probability of its choices, in bits."""
        bound, literal, pick = chooser.bound, chooser.literal, chooser.pick
        bits = 0.0
        rest: list[Piece] = [self._choice("", self._start)]
        while rest:
            piece = rest.pop()
            if isinstance(piece, str):
                literal(piece)
                continue
            branch = pick(self._resolve(piece, bound), rest)
            bits += branch.bits
            bound.update(branch.binds)
            rest += branch.pieces
        return bits

    def write(self, number: int) -> Tale:
        """The story whose choices are the digits of `number`, least significant first.

        The digits are in the mixed radix of the weights, so all numbers below a common multiple
        of the choices' products give each story exactly in proportion to its probability.
        """
        writer = _Writer(number)
        bits = self.walk(writer)
        return Tale("".join(writer.parts) % writer.bound, bits)

    def read(self, text: str) -> float:
        """The bits of `text`; ValueError, naming the position, if it is not in the grammar."""
        reader = _Reader(self, text)
        bits = self.walk(reader)
        if reader.position < len(text):
            raise reader.error(0)
        return bits

    def heads(self, branch: Branch, rest: Sequence[Piece], bound: dict[str, str]) -> Iterator[str]:
        """Every first fixed text of `branch` and the `rest` after it; END if they are empty."""
        if branch.binds:
            bound = {**bound, **branch.binds}
        pieces = branch.pieces or rest
        first = pieces[-1] if pieces else END
        if isinstance(first, str):
            yield first % bound
            return
        *rest, _ = [*rest, *branch.pieces]
        for inner in self._resolve(first, bound).branches:
            yield from self.heads(inner, rest, bound)

    def _resolve(self, piece: Choice | Slot, bound: Mapping[str, str]) -> Choice:
        if isinstance(piece, Choice):
            return piece
        variable, rule, without = piece
        return self._choice(variable, rule % bound, *[bound[name] for name in without])

    def _choice(self, variable: str, rule: str, *without: str) -> Choice:
        """The choice among the options of `rule` other than the texts `without`."""
        key = (variable, rule, *without)
        choice = self._choices.get(key)
        if choice is None:
            lines = (line.strip() for line in self._rules[rule].strip().splitlines())
            options = [_option(re.sub(" +", " ", line)) for line in lines]
            options = [option for option in options if option.text not in without]
            total = sum(option.weight for option in options)
            branches = tuple(self._branch(variable, option, total) for option in options)
            ladder = zip(branches, options, strict=True)
            choice = Choice(branches, tuple(b for b, o in ladder for _ in range(o.weight)))
            self._choices[key] = choice
        return choice

    def _branch(self, variable: str, option: Option, total: int) -> Branch:
        binds: dict[str, str] = {}
        if variable:
            binds = {f"{variable}.{name}": value for name, value in option.values.items()}
            binds[variable] = option.text
        bits = math.log2(total) - math.log2(option.weight)
        return Branch(tuple(reversed(self._pieces(option.text))), binds, bits)

    def _pieces(self, text: str) -> list[Piece]:
        """The pieces of `text` in order; a rule of one option is put in place of its name."""
        pieces: list[Piece] = []
        position = 0
        for match in _REFERENCE.finditer(text):
            _append(pieces, _template(text[position : match.start()]))
            position = match.end()
            variable, rule, without = match.groups(default="")
            if without or "{" in rule:
                pieces.append(Slot(variable, _template(rule), tuple(without.split("-")[1:])))
                continue
            choice = self._choice(variable, rule)
            if variable or len(choice.branches) > 1:
                pieces.append(choice)
            else:
                for piece in reversed(choice.branches[0].pieces):
                    _append(pieces, piece)
        _append(pieces, _template(text[position:]))
        return pieces


class _Writer:
    """Chooses by the digits of a number."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.bound: dict[str, str] = {}
        self.parts: list[str] = []
        self.literal = self.parts.append

    def pick(self, choice: Choice, rest: Sequence[Piece], /) -> Branch:
        ladder = choice.ladder
        self.number, digit = divmod(self.number, len(ladder))
        return ladder[digit]


class _Reader:
    """Chooses the one branch that the text ahead can begin with."""

    def __init__(self, grammar: Grammar, text: str) -> None:
        self.grammar = grammar
        self.text = text + END
        self.bound: dict[str, str] = {}
        self.position = 0

    def literal(self, template: str, /) -> None:
        literal = template % self.bound
        if not self.text.startswith(literal, self.position):
            raise self.error(self._agree(literal))
        self.position += len(literal)

    def pick(self, choice: Choice, rest: Sequence[Piece], /) -> Branch:
        heads: list[str] = []
        for branch in choice.branches:
            for head in self.grammar.heads(branch, rest, self.bound):
                if self.text.startswith(head, self.position):
                    return branch
                heads.append(head)
        raise self.error(max(map(self._agree, heads)))

    def error(self, ahead: int) -> ValueError:
        """The complaint about the character `ahead` of the position."""
        position = self.position + ahead
        found = self.text[position:].removesuffix(END)[:20]
        at = repr(found) if found else "the end"
        return ValueError(f"not a tale of this grammar: character {position}, at {at}")

    def _agree(self, literal: str) -> int:
        """How many characters of `literal` the text ahead agrees with."""
        ahead = self.text[self.position : self.position + len(literal)]
        pairs = zip(literal, ahead, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _option(line: str) -> Option:
    text, _, values = line.partition(" :: ")
    weight = re.match(r"(\d+)\* ", text)
    if weight:
        text = text[weight.end() :]
    text = re.sub(r"^_|_$", " ", text).replace("~", "").replace("/", "\n")
    pairs = (pair.partition("=") for pair in values.split("; ") if pair)
    named = {name: value for name, _, value in pairs}
    return Option(int(weight[1]) if weight else 1, text, named)


def _template(text: str) -> str:
    """`text` as a %-template, the fastest of Python's formats to fill in."""
    return _VARIABLE.sub(r"%(\1)s", text)


def _append(pieces: list[Piece], piece: Piece) -> None:
    """Append `piece`, joining it to a text that it continues: heads are as long as they can be."""
    last = pieces[-1] if pieces else None
    if isinstance(piece, str) and isinstance(last, str):
        pieces[-1] = last + piece
    elif piece != "":
        pieces.append(piece)


@cache
def grammar() -> Grammar:
    """The grammar of all tales."""
    return Grammar(RULES, START)


def tale(seed: int, index: int) -> Tale:
    """Story number `index` of `seed`: the same bytes in every version of Python, anywhere.

    Its choices are the digits of a 512-bit hash of the two numbers. A story uses fewer than 256 of
    those bits, so its chance of being written differs from its probability by less than one part
    in 2**256.
    """
    digest = blake2b(b"%d:%d" % (seed, index), digest_size=64).digest()
    return grammar().write(int.from_bytes(digest, "little"))


def tales(seed: int, start: int = 0, count: int | None = None) -> Iterator[Tale]:
    """Stories `start`, `start + 1`, ... of `seed`: `count` of them, or without end if None.

    Each is a pure function of the seed and its number, so workers may write any slices. Stories
    of one seed, and of different seeds, are independent, and may repeat only by chance.
    ValueError if `start` or `count` is negative.
    """
    if start < 0 or (count is not None and count < 0):
        raise ValueError(f"tales need start >= 0 and count >= 0, not {start} and {count}")
    indices = itertools.count(start) if count is None else range(start, start + count)
    return (tale(seed, index) for index in indices)


def bits(text: str) -> float:
    """-log2 of the probability of the story `text`, the same float as its `Tale.bits`.

    The ending where it ends is included. ValueError, naming the position of the first character
    that cannot follow what precedes it, if the text is not a story of the grammar.
    """
    return grammar().read(text)
