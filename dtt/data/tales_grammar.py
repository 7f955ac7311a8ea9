"""The grammar of the children's stories of `dtt.data.tales`, as data.

A rule is a set of options, one to a line. An option is `[weight*] text [:: name=value; ...]`:

* `<rule>` in the text stands for an option of that rule, chosen by weight (1 unless stated).
* `<x=rule>` also keeps the chosen text as the variable x, and the option's values as x.name.
* `<x=rule-y-z>` leaves out the options that the variables y and z hold.
* `{x}` is the value of a variable, in a text and in the name of a rule alike.
* `~` alone is the empty text, `_` is a space (at the ends of lines), `/` is a new paragraph.

Two laws keep the grammar unambiguous, and the tests check both. The options of a rule must differ
before the first text that either of them fixes runs out, counting what follows the rule: so a beat
that may start with a name or a pronoun chooses that first, and its verb after it. And a variable
is bound once in a story.
"""

from __future__ import annotations


def _lines(words: str, values: str = "") -> str:
    """One option for each word of `words`, all with the same values."""
    return "\n".join(f"{word} :: {values}" if values else word for word in words.split())


_HE = "he=he; He=He; him=him; his=his; His=His"
_SHE = "he=she; He=She; him=her; his=her; His=Her"
_BOYS = _lines("Pip Max Tom Ben Sam Leo Finn Otto Jack Gus Hugo Toby", _HE)
_GIRLS = _lines("Lily Mia Rosa Anna Ruby Nell Ivy Lucy Poppy Zoe Daisy Bella", _SHE)
_KINDS = _lines("fox mouse bear rabbit frog duck cat pig goat owl robot dragon otter", "names=any")
_HUES = (
    "red blue green yellow white black brown pink purple silver golden shiny tiny small lovely fine"
)
_NEW_LOOKS = "\n".join(f"a {hue} :: adj={hue}" for hue in _HUES.split())
_BOY = "boy :: names=he"
_GIRL = "girl :: names=she"

START = "story"

RULES: dict[str, str] = {
    # ------------------------------------------------------------------ the shape of a story
    "story": """
        <opening> <detail><plot><the_end>
    """,
    "opening": """
        Once upon a time, there was <a_hero> who lived <where=place> and <loved_to>.
        2* Once upon a time, <a_hero> lived <where=place> and <loved_to>.
        In <look> <house> <where=place> lived <a_hero> who <loved_to>.
        One day, <a_hero> who <loved_to> came to live <where=place>.
        <hero=name.any> was <a_kind> who lived <where=place> and <loved_to>.
    """,
    "loved_to": """
        loved to <hobby=hobby> and <hobby-hobby>
    """,
    "a_hero": """
        a <trait=trait>, <trait-trait> <hero.kind=kind.any> named <hero=name.{hero.kind.names}>
    """,
    "a_kind": """
        a <trait=trait>, <trait-trait> <hero.kind=kind.{hero.he}>
    """,
    "detail": """
        4* Every day, {hero.he} fed <number> <hue> <crowd1=crowd>, <number> <hue> \
        <crowd2=crowd-crowd1> and <number> <hue> <crowd-crowd1-crowd2>._
        3* {hero.He} wore <look> <garment1=garment>, <look> <garment2=garment-garment1> and <look> \
        <garment-garment1-garment2>._
    """,
    "plot": """
        <lost>
        2* One <sky> <time=time>, <one_day>
        <share>
        3* {hero.His} best friend was <a_friend>. One <sky> <time=time>, <with_friend>
    """,
    "the_end": """
        5* ~
        _The end.
    """,
    "one_day": """
        <alone>
        <fear>
    """,
    "with_friend": """
        <gift>
        <race>
        <build>
        <weather>
    """,
    # ------------------------------------------------------------------ a thing lost and found
    "lost": """
        <owned> <look=look> <thing=thing> from {hero.his} <giver>, but one <sky> <time>, <gone>. \
        <feel_low> {hero.He} <looked> <near> the <hue> <spot1=spot.{where.sort}> and <near> the \
        <hue> <spot2=spot.{where.sort}-spot1>.<gap><a_friend_came> <lost_talk> <at_last>, <finder> \
        found <it> <near> the <hue> <spot.{where.sort}-spot1-spot2>! <joy> <end_hero>
    """,
    "owned": """
        2* {hero.He} had
        Most of all, {hero.he} loved
    """,
    "gone": """
        it was gone
        the {thing} was gone
        {hero} lost it
    """,
    "lost_talk": """
        "What have you lost?" asked <friend_><how>. "My {thing}," <sadly_said> <hero_><how>.
        "I lost my {look.adj} {thing}," <sadly_said> <hero_><how>.
        "I will help you look," said <friend_><how>.
    """,
    "finder": """
        they
        {hero}
        {friend}
    """,
    "it": """
        it
        the {thing}
        the {look.adj} {thing}
    """,
    # ------------------------------------------------------------------ a friend is made
    "alone": """
        {hero} sat alone <near> the <hue> <spot1=spot.{where.sort}> and <sighed>. \
        <feel_low><gap><just_then> <a_friend> with <look> <thing=thing> <came>. "<would_you> \
        play with my {thing}?" asked <friend_><how>. They played with it <near> the <hue> \
        <spot.{where.sort}-spot1> until <until.{time}>. <joy> <end_hero>
    """,
    "sighed": """
        sighed
        cried
        saw the <hue> <crowd> play
    """,
    "would_you": """
        Do you want to
        Will you
    """,
    # ------------------------------------------------------------------ a fear overcome
    "fear": """
        {hero.he} <thought> <fear=a_fear> and hid <near> the <hue> <spot.{where.sort}>. \
        <feel_low><gap><a_friend_came> "I am <so> afraid of {fear}," <sadly_said> <hero_><how>. \
        "<think=think> of <number> <hue=hue> <crowd=crowd>," said <friend_><how>. <Hero> \
        {think.did} of the {hue} {crowd} and <forgot> {fear}. <joy> <end_fear>
    """,
    "think": """
        Think :: did=thought
        Talk :: did=talked
        Sing :: did=sang
    """,
    "thought": """
        thought of
        dreamed of
    """,
    # ------------------------------------------------------------------ food is shared
    "share": """
        {hero.He} sat <near> the <hue> <spot.{where.sort}> with <n1=number> <food1=food>, \
        <n2=number> <food2=food-food1> and <n3=number> <food3=food-food1-food2> for lunch. \
        <a_friend_came> <Friend> <felt> <so> <low>.<gap>"<hungry>," <sadly_said> <friend_><how>. \
        "Take my <given>," said <hero_><how>. They ate and talked of <hue> <topic1=crowd>, <hue> \
        <topic2=crowd-topic1> and <hue> <crowd-topic1-topic2> until <until.day>. <joy> <end_share>
    """,
    "hungry": """
        I have no lunch
        I am <so> hungry
        I lost my lunch
    """,
    "given": """
        {n1} {food1}
        {n2} {food2}
        {n3} {food3}
    """,
    # ------------------------------------------------------------------ plots of two old friends
    "gift": """
        it was {friend}'s birthday, but {hero} had no gift. <feel_low> "I will make <new_look> \
        <thing=thing>," thought <hero_>. {hero.He} used <three_stuffs>.<gap><at_last>, <hero_> \
        gave the {thing} and <number> <hue> <food> to <friend_>. "What a <good> {thing}!" \
        <gladly_said> <friend_><how>. <joy> <end_hero>
    """,
    "race": """
        they raced to the <hue> <goal=spot.{where.sort}> for <number> <food=food>, but <hero_> \
        fell on <look> <junk> and hurt {hero.his} <limb>. <feel_low><gap><Friend> <turned> to \
        help. "<lean>," said <friend_><how>. They <walked> to the {goal} <together> and ate the \
        {food}. <joy> <end_hero>
    """,
    "build": """
        they made <new_look> <build=building> <near> the <hue> <spot.{where.sort}> from \
        <three_stuffs>. But <crash>, and it fell. <feel_low><gap>"Let us use <hue> \
        <stuff=stuff-stuff1-stuff2-stuff3>," said <friend_><how>. With the {stuff}, the {build} \
        was <very> <strong>. <joy> <end_hero>
    """,
    "three_stuffs": """
        <hue> <stuff1=stuff>, <hue> <stuff2=stuff-stuff1> and <hue> <stuff3=stuff-stuff1-stuff2>
    """,
    "weather": """
        they took <number> <food1=food> and <number> <food2=food-food1> to the <hue> \
        <spot.{where.sort}>, but it began to <rain>. "The <lunch> are wet," <sadly_said> \
        <hero_><how>. <feel_low><gap>"We can <make=make> <new_look> <thing=thing>," said \
        <friend_><how>. They <went_in> and {make.did} the {thing} until <until.{time}>. \
        <joy> <end_hero>
    """,
    # ------------------------------------------------------------------ beats that plots share
    "feel_low": """
        <Hero> <felt> <so> <low=low>.
    """,
    "joy": """
        <Hero> <felt> <so> <high=high> and <high-high>.
    """,
    "a_friend_came": """
        <just_then> <a_friend> in <look> <garment> <came>.
    """,
    "lunch": _lines("{food1} {food2}"),
    "a_friend": """
        a <trait1=trait>, <trait-trait1> <friend.kind=kind.any-hero.kind> named \
        <friend=name.{friend.kind.names}-hero>
    """,
    "end_hero": """
        5* <end>
        So <hero_> was not {low} any more.
    """,
    "end_fear": """
        3* <end>
        And {hero} was never afraid of {fear} again.
    """,
    "end_share": """
        3* <end>
        In return, {friend} gave {hero} <number> <food-food1-food2-food3>.
    """,
    "end": """
        From that day on, {hero} and {friend} were <good> friends.
        After that, they would often {hobby} <together>.
        2* Then they went home <together> past the <hue> <spot.{where.sort}>.
        3* That night, <hero_> dreamed of <hue> <crowd> and <hue> <food>.
        3* The next day, {friend} gave {hero} <number> <hue> <crowd>.
    """,
    "gap": """
        _
        /
    """,
    # ------------------------------------------------------------------ who speaks, and how
    "Hero": """
        {hero}
        {hero.He}
        The {hero.kind}
    """,
    "hero_": """
        {hero}
        the {hero.kind}
    """,
    "Friend": """
        {friend}
        The {friend.kind}
    """,
    "friend_": """
        {friend}
        the {friend.kind}
    """,
    "sadly_said": _lines("said cried sighed sobbed"),
    "gladly_said": _lines("said cried laughed sang"),
    "how": "2* ~\n" + _lines("_softly _quietly _shyly _gently _loudly _quickly"),
    # ------------------------------------------------------------------ people and places
    "name.any": f"{_BOYS}\n{_GIRLS}",
    "name.he": _BOYS,
    "name.she": _GIRLS,
    "kind.any": f"{_KINDS}\n{_BOY}\n{_GIRL}",
    "kind.he": f"{_KINDS}\n{_BOY}",
    "kind.she": f"{_KINDS}\n{_GIRL}",
    "trait": _lines(
        "brave shy clever kind quiet gentle playful curious lazy silly polite busy young small "
        "tidy wise"
    ),
    "house": _lines("house hut tent cabin"),
    "place": """
        in the forest :: sort=wood
        in the garden :: sort=wood
        near the park :: sort=wood
        by the river :: sort=water
        by the sea :: sort=water
        near the lake :: sort=water
        in the meadow :: sort=field
        on the farm :: sort=field
        on the hill :: sort=field
        in the village :: sort=town
        by the castle :: sort=town
        near the mill :: sort=town
    """,
    "near": """
        behind
        beside
        near
        next to
    """,
    "spot.wood": _lines("tree log bush nest stump fern"),
    "spot.water": _lines("bridge rock boat reeds pier shell"),
    "spot.field": _lines("fence gate wagon haystack scarecrow hedge"),
    "spot.town": _lines("bench well wall barn fountain shop"),
    # ------------------------------------------------------------------ things
    "hue": _lines(f"{_HUES} old"),
    "new_look": _NEW_LOOKS,
    "look": f"{_NEW_LOOKS}\nan old :: adj=old",
    "thing": _lines(
        "ball kite drum basket whistle flag doll cup cart bell box lamp crown spoon puppet ring "
        "book clock horn spade sled pen mask coin"
    ),
    "garment": _lines("hat scarf coat cap ribbon belt"),
    "food": _lines("apples plums pears buns nuts carrots pies berries cakes beans peas figs"),
    "stuff": _lines("wood paper string cloth glue tin wool clay straw rope"),
    "building": _lines("raft den tower swing shed house"),
    "junk": _lines("stone leaf shoe stick toy"),
    "crowd": _lines("birds bees ducks sheep moths crabs toads worms ants snails geese hens"),
    "limb": _lines("knee foot nose arm"),
    "giver": _lines("mother father aunt uncle sister brother"),
    # ------------------------------------------------------------------ qualities
    "low": _lines("sad worried upset unhappy gloomy cross glum sorry tired weary"),
    "high": _lines("happy glad proud cheerful merry pleased jolly calm grand lively"),
    "so": """
        so
        very
        rather
        quite
        a little
    """,
    "very": _lines("so very quite"),
    "felt": _lines("felt was looked seemed"),
    "good": _lines("good fine lovely dear great"),
    "strong": _lines("strong tall firm safe"),
    "sky": _lines("sunny warm bright cool windy quiet fine misty"),
    "time": _lines("morning afternoon evening day"),
    "number": _lines("two three four five six seven eight nine"),
    # ------------------------------------------------------------------ doings
    "hobby": _lines("sing dance climb read draw skip swim run paint cook write whistle"),
    "make": """
        make :: did=made
        draw :: did=drew
        paint :: did=painted
    """,
    "a_fear": """
        the dark
        thunder
        deep water
        big dogs
        loud noises
        the wind
        spiders
        ghosts
    """,
    "forgot": """
        forgot
        soon forgot
    """,
    "rain": _lines("rain snow hail pour"),
    "crash": """
        the wind blew
        a branch hit it
        the ground shook
        a cow pushed it
    """,
    "just_then": """
        Just then,
        Soon
        Then
        After a while,
    """,
    "at_last": """
        At last
        Before long
        In the end
    """,
    "came": """
        came along
        walked by
        came to see
        ran up
        stopped by
    """,
    "looked": _lines("looked searched hunted"),
    "turned": """
        stopped
        turned back
        ran back
    """,
    "lean": """
        Take my hand
        Lean on me
        Do not cry
        Let me help you
    """,
    "walked": _lines("walked went ran hopped"),
    "together": """
        together
        side by side
        hand in hand
        arm in arm
    """,
    "went_in": """
        went inside
        ran home
        found a dry room
    """,
    "until.morning": _lines("noon lunch midday"),
    "until.afternoon": _lines("dusk sunset dinner"),
    "until.evening": _lines("bedtime midnight"),
    "until.day": _lines("dusk sunset dinner bedtime"),
}
