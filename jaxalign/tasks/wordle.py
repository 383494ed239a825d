"""Wordle: guess a word of five letters in six turns, told after each which letters are right.

The environment says g for a letter in its place, y for one that is elsewhere, b for one that is not (again) in the word: "crane"
against "canoe" is gbyyg. Rewards are those of ILQL's Wordle (2206.11871, section 5.1): -1 for each guess that is not the word, 0
for the one that is, so a return is minus the number of wrong guesses. What is no word of the list costs a guess and tells nothing.
"""

from __future__ import annotations

import collections
import functools
import json
import math
import re
from pathlib import Path
from typing import Callable, Sequence

import numpy as np

GUESSES = 6
FIRST = "Guess a word."

WORDS = tuple(
    """
about above actor adult after again agent agree ahead alarm album alert alike alive allow alone along alter among angel anger
angle ankle apart apple apply arena argue arise armor aside asset avoid awake award aware badly baker basic basin beach beard
beast began begin being below bench berry birth black blade blame blank blast blend bless blind block blood bloom board boast
bonus boost booth bound brain brand brave bread break brick bride brief bring broad brown brush build built bunch burst cabin
cable camel candy canoe cargo carry catch cause chain chair chalk charm chart chase cheap check cheek cheer chess chest chief
child chill choir civic claim class clean clear clerk click cliff climb clock close cloth cloud coach coast color couch could
count court cover crack craft crane crash cream creek crime crisp cross crowd crown cruel crush curve cycle daily dairy dance
dealt decay delay depth diary dirty doubt dough dozen draft drain drama dream dress drift drink drive early earth eight elbow
elder empty enemy enjoy enter entry equal error event every exact exist extra faint faith false fancy fault favor feast fence
fever field fifth fifty fight final first flame flash fleet flesh float flock floor flour fluid focus force forth forty found
frame fresh front frost fruit funny ghost giant given glass globe glory glove grace grade grain grand grant grape graph grass
grave great green greet grief group guard guess guest guide habit happy harsh heart heavy hello honey horse hotel house human
humor hurry ideal image index inner issue ivory jelly jewel joint judge juice knife knock known label labor large laser later
laugh layer learn least leave lemon level lever light limit linen liver local logic loose lower loyal lucky lunch magic major
maker maple march match maybe mayor medal mercy merit metal meter might minor model money month moral motor mount mouse mouth
movie music naval nerve never night noble noise north novel nurse ocean offer often olive onion opera orbit order other ought
outer owner paint panel paper party pasta patch pause peace pearl pedal phone photo piano piece pilot pitch pizza place plain
plane plant plate point polar pound power press price pride prime print prize proof proud queen quest quick quiet quite quote
radar radio raise range rapid ratio reach ready rebel reply rider ridge rifle right rival river roast robot rough round route
royal rural salad scale scene scent scope score sense serve seven shade shake shape share sharp sheep sheet shelf shell shine
shirt shock shore short shout sight silly since skill sleep slice slide slope small smart smile smoke snake solid solve sorry
sound south space spare spark speak speed spell spend spice spoon sport staff stage stair stand start state steam steel steep
stick still stone store storm story stove sugar sunny sweet swift swing table taste teach thank theme thick thing think third
those three throw tiger tight title toast today tooth topic torch total touch tower trace track trade trail train treat trend
trial tribe trick truck truly trust truth twice uncle under union unity until upper upset urban usage usual valid value video
visit vital voice wagon waste watch water whale wheat wheel where which while white whole whose woman world worry worth would
wound wrist write wrong yield young youth zebra
""".split()
)
_KNOWN = frozenset(WORDS)


@functools.lru_cache(1 << 20)
def feedback(guess: str, word: str) -> str:
    """g, y or b for each letter of the guess. Greens are counted first; a letter is yellow as often as the word has it beyond
    them, from the left."""
    left = collections.Counter(w for g, w in zip(guess, word) if g != w)
    out = []
    for g, w in zip(guess, word):
        yellow = g != w and left[g] > 0
        left[g] -= yellow
        out.append("g" if g == w else "y" if yellow else "b")
    return "".join(out)


def guess_of(action: str) -> str:
    """The last word of the list that an action has, in lower case; "guess" only where it has no other, for "My guess is crane" means
    crane. Without one its last word of five letters, or ""."""
    found = re.findall(r"(?<![a-z])[a-z]{5}(?![a-z])", action.lower())
    return ([w for w in found if w in _KNOWN and w != "guess"] or found or [""])[-1]


class Wordle:
    """The record's "word", or one drawn from the seed."""

    def reset(self, record: dict, seed: int) -> str:
        self.word = record.get("word") or WORDS[int(np.random.default_rng(seed).integers(len(WORDS)))]
        self.guesses = 0
        return FIRST

    def step(self, action: str) -> tuple[str, float, bool]:
        guess = guess_of(action)
        self.guesses += 1
        if guess == self.word:
            return "ggggg", 0.0, True
        return feedback(guess, self.word) if guess in _KNOWN else "no word", -1.0, self.guesses >= GUESSES


# -- players, for demonstrations and offline data -------------------------------------------------------------------

History = Sequence[tuple[str, str]]  # (guess, feedback) so far
Player = Callable[[History, np.random.Generator], str]


def consistent(history: History) -> list[str]:
    """The words that would have been answered as the guesses were."""
    return [w for w in WORDS if all(feedback(g, w) == f for g, f in history if g in _KNOWN)]


@functools.lru_cache(1 << 12)
def _sharpest(candidates: tuple[str, ...]) -> str:
    """The candidate whose feedback says most: largest entropy over the candidates, the first of equals."""

    def bits(guess):
        counts = collections.Counter(feedback(guess, w) for w in candidates).values()
        return -math.fsum(n / len(candidates) * math.log2(n / len(candidates)) for n in counts)

    return max(candidates, key=bits)


def expert(history: History, rng: np.random.Generator) -> str:
    """The most telling of the words that are left; the opening is drawn, for demonstrations that differ."""
    return _sharpest(tuple(consistent(history))) if history else WORDS[int(rng.integers(len(WORDS)))]


def careful(history: History, rng: np.random.Generator) -> str:
    """Any of the words that are left."""
    left = consistent(history)
    return left[int(rng.integers(len(left)))]


def careless(history: History, rng: np.random.Generator) -> str:
    """Any word."""
    return WORDS[int(rng.integers(len(WORDS)))]


PLAYERS: dict[str, Player] = {"expert": expert, "careful": careful, "careless": careless}


def play(player: Player, word: str, rng: np.random.Generator) -> dict:
    """One game as a row of data: {"messages": ..., "rewards": [of each guess], "return": their sum, "word"}."""
    game, history, rewards, done = Wordle(), [], [], False
    messages = [{"role": "user", "content": game.reset({"word": word}, 0)}]
    while not done:
        guess = player(history, rng)
        said, reward, done = game.step(guess)
        messages += [{"role": "assistant", "content": guess}, {"role": "user", "content": said}]
        history.append((guess, said))
        rewards.append(reward)
    return {"messages": messages[:-1], "rewards": rewards, "return": sum(rewards), "word": word}


def trajectories(n: int, seed: int, players: Sequence[str] = ("expert", "careful", "careless")) -> list[dict]:
    """n games for offline learning, each by one of the players, in turn."""
    rng = np.random.default_rng(seed)
    return [play(PLAYERS[players[i % len(players)]], WORDS[int(rng.integers(len(WORDS)))], rng) for i in range(n)]


class World:
    """What `jaxalign pipeline` writes before the first stage."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def write_all(self, directory: Path, sizes: dict[str, int], seed: int) -> None:
        """demonstrations.jsonl and demonstrations_eval.jsonl (careful players), trajectories.jsonl (all of them), prompts.jsonl (words to guess)."""
        rng = np.random.default_rng([self.seed, seed])
        make = {
            "demonstrations": lambda n: trajectories(n, int(rng.integers(2**31)), ("careful",)),
            "trajectories": lambda n: trajectories(n, int(rng.integers(2**31))),
            "prompts": lambda n: [{"prompt": FIRST, "word": WORDS[int(i)]} for i in rng.integers(len(WORDS), size=n)],
        }
        directory.mkdir(parents=True, exist_ok=True)
        for name, n in sizes.items():
            (directory / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in make[name.removesuffix("_eval")](n)), encoding="utf-8")
