"""Wordle and the calculator: rules worked out by hand, players that keep them."""

import json
import re

import numpy as np
import pytest
from jaxalign.data import formats
from jaxalign.tasks import calculator, wordle
from jaxalign.tasks.wordle import WORDS, feedback
from jaxalign.types import UserError


@pytest.mark.parametrize(
    "guess, word, want",
    [
        ("crane", "crane", "ggggg"),
        ("crane", "canoe", "gbyyg"),  # a and n elsewhere, no r
        ("speed", "abide", "bbyby"),  # one e: the first is yellow, none is left for the second; d elsewhere
        ("sheep", "steel", "gbggb"),  # both e in their places
        ("allow", "label", "yyybb"),  # two l, neither in place
        ("eerie", "enter", "gyybb"),  # one e green, one yellow, none for the third
        ("llama", "label", "gyybb"),  # one l green, one yellow; one a
    ],
)
def test_feedback(guess, word, want):
    assert feedback(guess, word) == want


def by_letters(guess, word):
    """The rule letter by letter: of each letter, greens first, then yellows from the left while the word has some left."""
    out = ["g" if a == b else "b" for a, b in zip(guess, word)]
    for c in set(guess):
        left = word.count(c) - sum(a == b == c for a, b in zip(guess, word))
        for i in [i for i, a in enumerate(guess) if a == c and out[i] != "g"][:left]:
            out[i] = "y"
    return "".join(out)


def test_feedback_is_the_rule_on_words_with_repeated_letters():
    rng = np.random.default_rng(0)
    few = ["".join(rng.choice(list("abc"), 5)) for _ in range(60)]
    assert all(feedback(a, b) == by_letters(a, b) for a in few for b in few)
    assert all(len(w) == 5 and w.isalpha() and w.islower() for w in WORDS) and len(set(WORDS)) == len(WORDS) > 300


def test_a_game():
    game = wordle.Wordle()
    assert game.reset({"word": "canoe"}, 0) == wordle.FIRST
    assert game.step(" I say CRANE!") == ("gbyyg", -1.0, False)
    assert game.step("zzzzz") == ("no word", -1.0, False) and game.step("") == ("no word", -1.0, False)
    assert game.step("canoe") == ("ggggg", 0.0, True)
    game.reset({}, 5)
    drawn, over = game.word, [game.step("zzzzz")[2] for _ in range(6)]
    assert over == [False] * 5 + [True] and wordle.Wordle().reset({}, 5) and drawn in WORDS
    other = wordle.Wordle()
    other.reset({}, 5)
    assert other.word == drawn  # the seed alone


@pytest.mark.parametrize(
    "action, guess",
    [("crane", "crane"), ("CRANE!", "crane"), ("Guess: crane", "crane"), ("My guess is crane.", "crane"), ("crane is my guess", "crane"), ("I think it could be crane", "crane"), ("guess", "guess"), ("My guess: guess", "guess")]
    + [("Guess: zzzzz", "zzzzz"), ("zzzzz", "zzzzz"), ("zzzzz or crane", "crane"), ("cranes", ""), ("", "")],
)
def test_the_word_of_an_action(action, guess):
    assert wordle.guess_of(action) == guess


def test_players_and_their_games():
    """Careful players never guess what cannot be; better players lose fewer guesses; games read as chats; the same seed, the same games."""
    games = wordle.trajectories(30, 1, ("expert", "careful", "careless"))
    mean = [np.mean([g["return"] for g in games[k::3]]) for k in range(3)]
    assert mean[2] < mean[1] and mean[2] < mean[0] and games == wordle.trajectories(30, 1)
    for g in games:
        guesses = [m["content"] for m in g["messages"] if m["role"] == "assistant"]
        said = [m["content"] for m in g["messages"] if m["role"] == "user"][1:]
        assert len(g["rewards"]) == len(guesses) == len(said) + 1 <= 6 and g["return"] == sum(g["rewards"])
        assert (g["rewards"][-1] == 0) == (guesses[-1] == g["word"])
        formats.canonical(g)
    for g in games[1::3]:
        guesses = [m["content"] for m in g["messages"] if m["role"] == "assistant"]
        for k in range(len(guesses)):
            assert guesses[k] in wordle.consistent([(x, feedback(x, g["word"])) for x in guesses[:k]])


def test_calculator():
    assert [calculator.calc(x) for x in ("48*37+12", " (1+2)*-3", "7/2", "6/2")] == ["1788", "-9", "7/2", "3"]
    for bad in ("2**99999999", "__import__('os')", "1.5", "x", "1" * 300, "", "1/0"):
        with pytest.raises((ValueError, SyntaxError, ZeroDivisionError)):
            calculator.calc(bad)
    game = calculator.Calculator()
    assert game.reset({"sum": "6*7"}, 0) == "6*7="
    assert game.step("it is 41, no: 42") == ("", 1.0, True) and game.step("42 or 41")[1] == 0 and game.step("")[1] == 0
    game.reset({}, 3)
    assert game.step(calculator.calc(game.sum))[1] == 1
    formats.canonical(calculator.conversation("6*7"))


@pytest.mark.parametrize(
    "record_sum, right, wrong",
    [
        ("7/2", ["7/2", "3.5", "7/2 = 3.50.", "-1 + 4.5 = 3.5"], ["7", "2", "3", "35", "14/4", "3.51", "7/0"]),
        ("1/3", ["1/3"], ["0.333", "1"]),
        ("-7/2", ["-7/2", "it is -3.5"], ["7/2", "3.5"]),
        ("84/2", ["42", "84/2=42", "42.0"], ["84/2", "84/2=", "420", "9" * 5000]),
    ],
)
def test_the_answer_to_a_division(record_sum, right, wrong):
    game = calculator.Calculator()
    game.reset({"sum": record_sum}, 0)
    assert [x for x in right + wrong if game.step(x)[1]] == right


@pytest.mark.parametrize("record_sum", ["1/0", "6*", "two", "1.5", 7])
def test_a_sum_without_a_value_is_refused_where_it_is_read(record_sum):
    with pytest.raises(UserError, match=re.escape(f"'sum': {record_sum!r}")):
        calculator.Calculator().reset({"sum": record_sum}, 0)


def test_worlds_write_what_stages_read(tmp_path):
    wordle.World().write_all(tmp_path / "w", {"demonstrations": 3, "trajectories": 2, "prompts": 4}, 0)
    calculator.World().write_all(tmp_path / "c", {"demonstrations": 4, "prompts": 3}, 0)
    for path in sorted(tmp_path.rglob("*.jsonl")):
        rows = [json.loads(x) for x in path.read_text().splitlines()]
        assert rows and all(type(formats.canonical(r)).__name__ == ("Prompt" if path.stem == "prompts" else "Trajectory" if "rewards" in r else "Chat") for r in rows)
    assert sum("[calc(" in x for x in (tmp_path / "c/demonstrations.jsonl").read_text().splitlines()) == 2
