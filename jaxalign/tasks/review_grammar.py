"""The words and sentence forms of the `reviews` world, and the parser that reads a sentence back into choices.

Everything here is data. A form is a template whose slots are filled from weighted word lists; what a slot may hold
depends on the scene (the item, the mood of the writer, what was said before), and `reviews.World` knows how. The
forms are disjoint and unambiguous: a sentence matches at most one of them, in one way. Only the writer's sentiment
and style are never written down, and those are summed out.

Words that carry an opinion are listed in pairs, mild and strong; `STRENGTHS` turns the place in the pair into a number.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

STRENGTHS = (0.5, 1.0)

# category -> items
ITEMS = {
    "food": ("noodle soup", "garlic bread", "lemon cake", "bean stew", "apple pie", "rice bowl"),
    "thing": ("desk lamp", "wrist watch", "hand drill", "tea pot", "radio set", "wall clock"),
    "place": ("sea hotel", "corner cafe", "city museum", "night market", "lake cabin", "roof garden"),
    "story": ("crime novel", "space film", "ghost play", "war drama", "family saga", "jungle comic"),
}

# category -> aspect -> what one can say of it: praise, blame. Aspects in s are plural, `price` belongs to all.
PRICE = {"price": ("fair tiny", "high unfair")}
ASPECTS = {
    "food": PRICE
    | {
        "taste": ("fresh heavenly", "bland bitter"),
        "smell": ("fresh inviting", "stale rotten"),
        "texture": ("soft creamy", "dry slimy"),
        "spices": ("gentle lively", "faint burnt"),
        "portion": ("fair huge", "small silly"),
    },
    "thing": PRICE
    | {
        "shape": ("neat elegant", "odd ugly"),
        "handle": ("firm perfect", "loose useless"),
        "buttons": ("clear perfect", "stiff useless"),
        "finish": ("neat shiny", "rough ugly"),
        "weight": ("light ideal", "heavy absurd"),
    },
    "place": PRICE
    | {
        "staff": ("gentle lovely", "slow rude"),
        "view": ("clear splendid", "plain gloomy"),
        "rooms": ("neat cosy", "dark filthy"),
        "lights": ("soft magical", "faint broken"),
        "tables": ("neat spotless", "small filthy"),
    },
    "story": PRICE
    | {
        "plot": ("clear brilliant", "thin silly"),
        "ending": ("clear moving", "plain hollow"),
        "characters": ("gentle charming", "flat wooden"),
        "pace": ("light lively", "slow deadly"),
        "jokes": ("gentle brilliant", "stale rude"),
    },
}

# opinions that fit any item: praise, blame
OPINIONS = {
    "quality": ("good superb", "poor awful"),
    "feel": ("liked loved", "disliked hated"),
    "often": ("surely always", "rarely never"),
    "stars": ("eight ten", "three zero"),
    "advise": ("Try Treasure", "Question Avoid"),
}

# words without an opinion; (category -> words) where the category matters
WORDS = {
    "ask": "Review|Describe|Rate|Discuss",
    "day": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
    "kin": "sister|brother|mother|father|cousin|friend",
    "coins": "two|three|five|six|eight|nine|ten|twenty",
    "find": "I found|We found|I thought|We thought",
    "weather": "hot|cold|rainy|sunny|foggy",
    "went": "walked|drove|ran|went",
    "where": "station|river|school|beach|park|market",
    "made": "painted|sold|carried|washed|lost",
    "object": "boat|chair|fence|table|basket|clock",
    "tried": {
        "food": "ordered|cooked|shared",
        "thing": "bought|carried|used",
        "place": "visited|booked|entered",
        "story": "finished|started|shared",
    },
    "redo": {"food": "order|cook", "thing": "buy|use", "place": "visit|book", "story": "start|share"},
}

# slots with explicit weights, by the part of the scene they depend on
LEAD = {  # does the opinion turn against the one before? A stronger hint than this takes a tiny model too long to learn
    "first": {"The": 1.0},
    "same": {"The": 0.8, "And the": 0.2},
    "turn": {"The": 0.6, "But the": 0.4},
}
DEGREES = {"": 1.0, "fairly ": 0.75, "very ": 1.25, "so ": 1.4}  # word -> factor on the strength
DEGREE = {  # (style, negated?) -> weights; "not so good" is mild enough without
    ("calm", False): {"": 0.65, "fairly ": 0.25, "very ": 0.1},
    ("lively", False): {"": 0.3, "very ": 0.4, "so ": 0.3},
    ("calm", True): {"": 0.8, "very ": 0.2},
    ("lively", True): {"": 0.4, "very ": 0.6},
}
MARK = {"calm": {".": 0.97, "!": 0.03}, "lively": {".": 0.6, "!": 0.4}}
NOT = {"": 0.97, "not ": 0.03}

SENTIMENT = {"kind": 0.33, "torn": 0.34, "harsh": 0.33}  # never written down ...
STYLE = {"calm": 0.6, "lively": 0.4}  # ... and neither is this
PRAISE = {"kind": 0.9, "torn": 0.5, "harsh": 0.1}  # sentiment -> probability that an opinion is praise
GENRE = {"answer": 0.55, "review": 0.3, "diary": 0.15}
MIDDLE = {2: 0.4, 3: 0.4, 4: 0.2}  # sentences between opening and verdict
VERDICT = {0: 0.15, 1: 0.85}
DIARY = {3: 0.3, 4: 0.4, 5: 0.3}


class Form(NamedTuple):
    """One kind of sentence: where it may stand, how often it does, what it says, and of what it is an opinion."""

    stage: str
    weight: float
    template: str
    about: str | None = None  # "aspect": of the aspect it names; None: not an opinion

    @property
    def slots(self) -> tuple[str, ...]:
        return _slots(self.template)


@functools.cache
def _slots(template: str) -> tuple[str, ...]:
    """In the order of choosing: the item first, for the words before it depend on it ("We {tried} the {item}")."""
    return tuple(sorted(re.findall(r"{(\w+)}", template), key=lambda slot: slot != "item"))


FORMS = {
    "ask": Form("request", 0.3, "{ask} the {item}."),
    "ask one": Form("request", 0.35, "{ask} the {item}. Mention the {first}."),
    "ask two": Form("request", 0.35, "{ask} the {item}. Mention the {first} and the {second}."),
    "was": Form("opening", 0.4, "The {item} was {not}{degree}{quality}{mark}", "overall"),
    "felt": Form("opening", 0.3, "I {feel} the {item}{mark}", "overall"),
    "tried": Form("opening", 0.3, "We {tried} the {item} on {day}{mark}"),
    "aspect": Form("middle", 0.5, "{lead} {aspect} {be} {not}{degree}{quality}{mark}", "aspect"),
    "found": Form("middle", 0.27, "{find} the {aspect} {degree}{quality}{mark}", "aspect"),
    "aspect of": Form("middle", 0.05, "The {aspect} of the {item} {be} {degree}{quality}{mark}", "aspect"),
    "cost": Form("middle", 0.09, "It cost {coins} coins{mark}"),
    "kin": Form("middle", 0.09, "My {kin} {tried} it too{mark}"),
    "again": Form("verdict", 0.35, "I would {often} {redo} it again{mark}", "verdict"),
    "stars": Form("verdict", 0.35, "I give it {stars} points{mark}", "verdict"),
    "advise": Form("verdict", 0.3, "{advise} the {item}{mark}", "verdict"),
    "weather": Form("diary", 0.2, "{day} was {weather}."),
    "walk": Form("diary", 0.3, "My {kin} {went} to the {where}."),
    "work": Form("diary", 0.3, "My {kin} {made} the {object}."),
    "pay": Form("diary", 0.2, "Then we paid {coins} coins for the {object}."),
}


def listed(words) -> tuple[str, ...]:
    return tuple(words.split("|" if "|" in words else None)) if isinstance(words, str) else tuple(words)


CATEGORY = {item: category for category, items in ITEMS.items() for item in items}


ASPECT_WORDS = {aspect: words for aspects in ASPECTS.values() for aspect, words in aspects.items()}


@functools.cache
def values() -> dict[tuple[str, str], float]:
    """(slot, word) -> signed strength of the bare word, in [-1, 1]. A word says the same of every aspect."""
    out = {}
    for slot, opposites in [*OPINIONS.items(), *(("quality", words) for words in ASPECT_WORDS.values())]:
        for sign, words in zip((1, -1), opposites):
            for word, strength in zip(listed(words), STRENGTHS, strict=True):
                if out.setdefault((slot, word), sign * strength) != sign * strength:
                    raise ValueError(f"{word!r} has two strengths")
    return out


class Sentence(NamedTuple):
    """A sentence read back: its form, the word in each slot, the signed value of its opinion (None: it has none)."""

    form: str
    words: dict[str, str]
    value: float | None


@functools.cache
def _patterns() -> tuple[tuple[str, re.Pattern], ...]:
    """(form, its template with a named group for every slot: any word the slot can hold in any scene)."""
    held = {slot: {w for v in words.values() for w in listed(v)} if isinstance(words, dict) else listed(words)
            for slot, words in WORDS.items()}  # fmt: skip
    held |= {slot: {word for s, word in values() if s == slot} for slot in OPINIONS}
    held |= {slot: ASPECT_WORDS for slot in ("aspect", "first", "second")}
    held |= {"item": CATEGORY, "be": {"was", "were"}, "not": NOT, "mark": {".", "!"}, "degree": DEGREES}
    held["lead"] = {word for weights in LEAD.values() for word in weights}

    def group(match):
        return f"(?P<{match[1]}>{'|'.join(map(re.escape, sorted(held[match[1]], reverse=True)))})"

    patterns = {name: re.sub(r"{(\w+)}", group, form.template.replace(".", r"\.")) for name, form in FORMS.items()}
    return tuple((name, re.compile(pattern)) for name, pattern in patterns.items())


@functools.lru_cache(1 << 17)
def parse(sentence: str) -> Sentence | None:
    """Reads one sentence, end mark included; None when no form makes it. Context is not checked here."""
    for name, pattern in _patterns():
        if match := pattern.fullmatch(sentence):
            words = match.groupdict()
            value = next((values()[s, words[s]] for s in OPINIONS if s in words), None)
            if value is not None:
                value *= DEGREES[words.get("degree", "")] * (-0.5 if words.get("not") else 1.0)
            return Sentence(name, words, value)
    return None


def sentences(text: str) -> list[str]:
    """Splits after every end mark and the one space behind it. A request's second half stays with its first."""
    return re.split(r"(?<=[.!]) (?!Mention )", text) if text else []
