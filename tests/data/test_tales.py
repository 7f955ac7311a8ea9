"""The stories of `dtt.data.tales`: their bytes, their probabilities, and their sense."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import pytest

from dtt.data import tales_grammar
from dtt.data.tales import Branch, Choice, Grammar, Piece, Tale, bits, grammar, tale, tales

COUNT = 2000
HEROES = set(re.findall(r"^\w+", tales_grammar.RULES["name.any"], re.MULTILINE))
GIRLS = set(re.findall(r"^\w+", tales_grammar.RULES["name.she"], re.MULTILINE))

# Every feature of the notation: weights, binding, values, rules chosen by a value, exclusion,
# an empty option before a fixed text and before the end, and a text that its variables fill in.
SMALL = {
    "story": "<hero=name> met <friend=name-hero>.<weather> {hero.He} <did.{hero.he}>.<end>",
    "name": "2* Pip :: he=he; He=He\nMia :: he=she; He=She\nTom :: he=he; He=He",
    "weather": "3* ~\n_It <fell>.",
    "fell": "rained\nsnowed",
    "did.he": "sang to {friend}\nran",
    "did.she": "slept",
    "end": "2* ~\n_The end.\n/Good night, <name-friend>.",
}


@pytest.fixture(scope="module")
def stories() -> list[Tale]:
    return list(tales(0, 0, COUNT))


class Scripted:
    """Takes the branches that a script numbers, then the first; records what it met."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script = script
        self.bound: dict[str, str] = {}
        self.text = ""
        self.taken: list[tuple[int, int]] = []
        self.probability = Fraction(1)
        self.radix = 1

    def literal(self, template: str, /) -> None:
        self.text += template % self.bound

    def pick(self, choice: Choice, rest: Sequence[Piece], /) -> Branch:
        depth = len(self.taken)
        index = self.script[depth] if depth < len(self.script) else 0
        branch = choice.branches[index]
        self.taken.append((index, len(choice.branches)))
        self.probability *= Fraction(choice.ladder.count(branch), len(choice.ladder))
        self.radix *= len(choice.ladder)
        return branch


def every_story(small: Grammar) -> list[Scripted]:
    """Every story of a small grammar, by counting through its choices like an odometer."""
    found: list[Scripted] = []
    script: list[int] | None = []
    while script is not None:
        walk = Scripted(script)
        small.walk(walk)
        found.append(walk)
        taken = walk.taken
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        script = [index for index, _ in taken[:-1]] + [taken[-1][0] + 1] if taken else None
    return found


class Suspicious:
    """Writes a story and checks at every choice that one fixed text tells the branches apart."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.radix = 1
        self.bound: dict[str, str] = {}

    def literal(self, template: str, /) -> None:
        assert template

    def pick(self, choice: Choice, rest: Sequence[Piece], /) -> Branch:
        heads = [
            (head, index)
            for index, branch in enumerate(choice.branches)
            for head in grammar().heads(branch, rest, self.bound)
        ]
        # Sorted, a text is followed at once by a text that it begins, if there is any.
        for (one, first), (other, second) in itertools.pairwise(sorted(heads)):
            assert first == second or not other.startswith(one), (one, other)
        assert all(branch.binds.keys().isdisjoint(self.bound) for branch in choice.branches)
        self.radix *= len(choice.ladder)
        self.number, digit = divmod(self.number, len(choice.ladder))
        return choice.ladder[digit]


# ---------------------------------------------------------------------------- the same bytes


def test_a_seed_promises_its_bytes() -> None:
    text = "\n\n".join(story.text for story in tales(0, 0, 200))
    digest = hashlib.sha256(text.encode("ascii")).hexdigest()
    assert digest == "570925b6dfb1d966257b29fb7e339d0e6dce4f8a03ee567fec8395142fa4fb5c"


def test_a_story_is_a_function_of_seed_and_number(stories: list[Tale]) -> None:
    assert list(tales(0, 5, 3)) == stories[5:8]
    assert list(itertools.islice(tales(0, 1990), 10)) == stories[1990:]
    assert tale(0, 7) == stories[7]
    assert list(tales(0, 3, 0)) == []


def test_seeds_and_numbers_give_different_stories(stories: list[Tale]) -> None:
    texts = {story.text for story in stories} | {story.text for story in tales(1, 0, 100)}
    texts |= {tale(-1, 0).text, tale(10, 1).text, tale(1, 101).text, tale(2**70, 2**70).text}
    assert len(texts) == COUNT + 104


@pytest.mark.parametrize(("start", "count"), [(-1, None), (0, -1)])
def test_negative_slices_are_refused_at_once(start: int, count: int | None) -> None:
    with pytest.raises(ValueError, match=r">= 0.*-1"):
        tales(0, start, count)


# ---------------------------------------------------------------------------- probabilities


def test_reading_a_story_gives_the_bits_of_writing_it(stories: list[Tale]) -> None:
    for story in stories:
        assert bits(story.text) == story.bits


def test_the_probabilities_of_a_small_grammar_sum_to_one() -> None:
    small = Grammar(SMALL, "story")
    found = every_story(small)
    texts = [walk.text for walk in found]
    assert len(set(texts)) == len(texts)
    assert "Pip met Mia. It snowed. He sang to Mia. The end." in texts
    assert "Mia met Tom. She slept.\nGood night, Pip." in texts
    assert sum(walk.probability for walk in found) == 1
    for walk in found:
        assert small.read(walk.text) == pytest.approx(-math.log2(walk.probability), abs=1e-12)


def test_numbers_write_stories_in_proportion_to_their_probability() -> None:
    small = Grammar(SMALL, "story")
    found = every_story(small)
    total = math.lcm(*(walk.radix for walk in found))
    counts = Counter(small.write(number) for number in range(total))
    assert {story.text: Fraction(count, total) for story, count in counts.items()} == {
        walk.text: walk.probability for walk in found
    }
    entropy = -sum(float(walk.probability) * math.log2(walk.probability) for walk in found)
    mean = sum(story.bits * count for story, count in counts.items()) / total
    assert mean == pytest.approx(entropy, abs=1e-9)


def test_hashes_choose_plots_and_places_by_their_weights(stories: list[Tale]) -> None:
    texts = [story.text for story in stories]
    for pattern, probability in [
        (r"^Once upon a time", 3 / 6),
        (r" best friend was ", 3 / 7),
        (r" The end\.$", 1 / 6),
        (r"^[^.]* near the lake\b", 1 / 12),
    ]:
        share = sum(bool(re.search(pattern, text)) for text in texts) / COUNT
        sigma = math.sqrt(probability * (1 - probability) / COUNT)
        assert abs(share - probability) < 4 * sigma, pattern


def test_no_choice_is_ambiguous_and_no_variable_is_bound_twice() -> None:
    for index in range(150):
        digest = hashlib.sha512(b"%d" % index).digest()
        walk = Suspicious(int.from_bytes(digest, "little"))
        grammar().walk(walk)
        assert walk.radix < 2**256, "a story must not use up the hash that chooses it"


def test_the_floor_and_the_sizes_are_as_documented(stories: list[Tale]) -> None:
    size = sum(len(story.text) for story in stories)
    assert 540 < size / COUNT < 580
    assert 0.29 < sum(story.bits for story in stories) / size < 0.31
    assert all(400 < len(story.text) < 700 for story in stories)
    assert max(story.bits for story in stories) < 256


# ---------------------------------------------------------------------------- what is no story


def test_a_changed_character_is_named() -> None:
    text = tale(0, 0).text
    for position in range(len(text)):
        with pytest.raises(ValueError, match=rf"character {position}, at '#"):
            bits(text[:position] + "#" + text[position + 1 :])


def test_a_story_cut_short_or_run_on_is_named() -> None:
    text = tale(0, 0).text.removesuffix(" The end.")
    for end in (0, 1, 40, len(text) - 1):
        with pytest.raises(ValueError, match=rf"character {end}, at the end"):
            bits(text[:end])
    for more in ("\n", "\n\n", "\0", " Then.", " The end. "):
        with pytest.raises(ValueError, match=r"character \d+, at '"):
            bits(text + more)


def test_a_story_that_forgets_a_name_is_no_story(stories: list[Tale]) -> None:
    for story in stories[:100]:
        last = names(story.text)[-1]
        other = min(HEROES - set(names(story.text)))
        head, _, tail = story.text.rpartition(last)
        if last in head:
            with pytest.raises(ValueError, match=r"character \d+, at") as caught:
                bits(head + other + tail)
            position = int(re.findall(r"\d+", str(caught.value))[0])
            assert len(head) <= position <= len(head + other)


# ---------------------------------------------------------------------------- sense and style


def names(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text) if word in HEROES]


def test_names_and_pronouns_stay_the_same(stories: list[Tale]) -> None:
    for story in stories:
        text = story.text
        assert len(set(names(text))) == 2, text
        wrong = r"\b(he|him|his)\b" if names(text)[0] in GIRLS else r"\b(she|her)\b"
        assert not re.search(wrong, text, re.IGNORECASE), text


def test_what_a_story_says_late_follows_from_what_it_said_early(stories: list[Tale]) -> None:
    """Each pattern is one plot: the groups named twice must agree, and every plot must occur."""
    patterns = {
        "lost": r"(?:had|loved) an? \w+ (?P<x>\w+) from .* found (?:it|the (?:\w+ )?(?P=x)) ",
        "alone": r"with an? \w+ (?P<x>\w+) .* play with my (?P=x)\?.* played with it",
        "fear": r"(?:thought|dreamed) of (?P<x>[\w ]+) and hid .* afraid of (?P=x),.*forgot (?P=x)",
        "share": r" (?P<x>\w+ \w+)(?=[ ,]).* for lunch.*Take my (?P=x),",
        "gift": r"make an? \w+ (?P<x>\w+),.* gave the (?P=x) and .*What a \w+ (?P=x)!",
        "race": r"raced to the \w+ (?P<x>\w+) for \w+ (?P<y>\w+),.*to the (?P=x) .* the (?P=y)\.",
        "build": r"made an? \w+ (?P<x>\w+) .*use \w+ (?P<y>\w+),.*With the (?P=y), the (?P=x) was",
        "weather": r"took .* (?P<x>\w+) .*The (?P=x) are .*(?:make|draw|paint) an? \w+ (?P<y>\w+),"
        r".*(?:made|drew|painted) the (?P=y) until",
    }
    seen = Counter[str]()
    for story in stories:
        text = story.text.replace("\n", " ")
        plots = [plot for plot, pattern in patterns.items() if re.search(pattern, text)]
        assert len(plots) == 1, (plots, text)
        seen[plots[0]] += 1
        for mood in re.findall(r"not (\w+) any more", text):
            assert len(re.findall(rf"\b{mood}\b", text)) > 1, text
    assert min(seen[plot] for plot in patterns) > COUNT / 20


def test_stories_are_clean_prose(stories: list[Tale]) -> None:
    for story in stories:
        text = story.text
        assert text.isascii() and text == text.strip()
        assert text.count("\n") <= 1
        assert not re.search(r"  | \n|\n |[{}<>%_~/=]|[ \n][.,!?]", text), text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text, re.IGNORECASE), text
        assert not re.search(r"\b(\w+) \1\b", text), text
        told = re.sub(r'[?!]" ', ", ", text)
        assert not re.search(r'(?:^|[.!?]"?[ \n])"?[a-z]', told), text
        assert re.search(r"[.]$", text), text


def test_every_word_of_the_grammar_is_used_and_there_are_few(stories: list[Tale]) -> None:
    words = Counter(word for story in stories for word in re.findall(r"[a-z]+", story.text.lower()))
    assert 300 <= len(words) <= 450
    rules = "\n".join(tales_grammar.RULES.values())
    rules = re.sub(r"::.*|<[^>]*>|\{[^}]*\}", " ", rules)
    assert set(re.findall(r"[a-z]+", rules.lower())) <= words.keys()
    assert min(words.values()) > 10
