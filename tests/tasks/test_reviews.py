"""The world must be exactly what it says: every number here is derived by hand or by enumeration."""

import collections
import itertools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxalign.tasks import review_grammar as g
from jaxalign.tasks import review_labels as labels
from jaxalign.tasks import reviews
from jaxalign.tasks.reviews import World, gold_reward

WORLD = World()
PROMPT = "Review the noodle soup. Mention the taste and the price."


@pytest.fixture(scope="module")
def texts():
    return WORLD.texts(3000, seed=1)


@pytest.fixture(scope="module")
def demonstrations():
    return WORLD.demonstrations(3000, seed=2)


# -- the probability of a text --------------------------------------------------------------------------------------


def test_every_text_has_a_probability_and_one_reading(texts, demonstrations):
    assert all(-120 < WORLD.log_prob(text) < 0 for text in texts)
    assert all(-120 < WORLD.demonstration_log_prob(d["prompt"], d["completion"]) < 0 for d in demonstrations)
    for sentence in {s for text in texts[:1000] for s in g.sentences(text)}:
        assert sum(pattern.fullmatch(sentence) is not None for _, pattern in g._patterns()) == 1, sentence


class Script:
    """Follows a list of choices, by place in the table, then takes first choices; `widths` lists how many there were.

    `full` ({slot: words}) says which words of a slot are tried; of a slot it does not name, only the first.
    """

    def __init__(self, script, full):
        self.script, self.full, self.taken, self.widths, self.p = list(script), full, [], [], 1.0

    def __call__(self, slot, table):
        allowed = self.full.get(slot, table.words[:1])
        words = [word for word in table.words if allowed is all or word in allowed]
        place = self.script[len(self.taken)] if len(self.taken) < len(self.script) else 0
        self.taken.append(place)
        self.widths.append(len(words))
        self.p *= math.exp(table.log[words[place]])
        return words[place]


def enumerate_texts(story, full):
    """{text: sum of the probabilities of every way to write it}, by walking the tree of choices; it never parses."""
    total, script = collections.Counter(), []
    while True:
        pick = Script(script, full)
        total[story(pick)] += pick.p
        script = pick.taken
        while script and script[-1] + 1 == pick.widths[len(script) - 1]:
            script.pop()
        if not script:
            return total
        script[-1] += 1


def test_log_prob_sums_every_way_to_write_a_text():
    full = {"genre": ["review"], "middle": [2], "sentiment": all, "style": all, "close": all, "polarity": all}
    full |= {"not": all, "form": ["was", "tried", "aspect", "cost", "again"], "lead": ["The", "But the"]}
    found = enumerate_texts(WORLD._document, full)
    assert len(found) > 300
    for text, p in found.items():
        assert WORLD.log_prob(text) == pytest.approx(math.log(p), abs=1e-9), text


def test_log_prob_of_an_answer_and_of_a_demonstration():
    full = {"genre": ["answer"], "sentiment": all, "style": all, "middle": [2], "close": [0], "polarity": all}
    full |= {"form": ["ask two", "felt", "aspect"], "item": all, "aspect": ["taste", "smell", "price"]}
    full |= {"first": ["taste"], "second": ["price"], "lead": ["The", "But the"]}
    found = enumerate_texts(WORLD._document, full | {"item": ["noodle soup", "lemon cake"]})
    assert len(found) > 100 and any("noodle soup" in t and "lemon cake" in t for t in found)  # the drift is in there
    for text, p in found.items():
        assert WORLD.log_prob(text) == pytest.approx(math.log(p), abs=1e-9), text
    scene = {"item": "noodle soup", "asked": ("taste", "price")}
    for text, p in enumerate_texts(lambda pick: WORLD._review(dict(scene), reviews.CAREFUL, pick), full).items():
        assert WORLD.demonstration_log_prob(PROMPT, " " + text) == pytest.approx(math.log(p), abs=1e-9)


def test_mass_of_a_sublanguage_is_analytic():
    # Three weather sentences make a diary of probability P(diary) P(3 sentences) P(weather)^3, summed over all words.
    words = [g.listed(g.WORDS[slot]) for slot in ("day", "weather")]
    lines = [f"{day} was {weather}." for day, weather in itertools.product(*words)]
    # The lines are independent given the length, so three sums over one line each do for the sum over all triples.
    base = WORLD.log_prob(" ".join(lines[:1] * 3))
    mass = math.exp(base)
    for k in range(3):
        texts = [" ".join([line if i == k else lines[0] for i in range(3)]) for line in lines]
        mass *= sum(math.exp(WORLD.log_prob(text) - base) for text in texts)
    assert mass == pytest.approx(g.GENRE["diary"] * g.DIARY[3] * g.FORMS["weather"].weight ** 3, rel=1e-9)


def test_samples_follow_the_hidden_sentiment(texts):
    # P(opening praises, verdict praises | both are opinions) = sum over z of P(z) P(praise | z)^2.
    pairs = []
    for text in texts:
        said = [g.parse(s) for s in g.sentences(text)]
        ends = {g.FORMS[s.form].stage: s.value > 0 for s in said if s.value is not None}
        if {"opening", "verdict"} <= ends.keys():
            pairs.append(ends["opening"] and ends["verdict"])
    expected = sum(p * g.PRAISE[z] ** 2 for z, p in g.SENTIMENT.items())  # 0.356
    assert len(pairs) > 1000
    assert abs(np.mean(pairs) - expected) < 4 * math.sqrt(expected * (1 - expected) / len(pairs))


def test_entropy_agrees_between_samples(texts):
    one = [-WORLD.log_prob(text) for text in texts[:2000]]
    two = [-WORLD.log_prob(text) for text in WORLD.texts(2000, seed=9)]
    assert abs(np.mean(one) - np.mean(two)) < 4 * math.hypot(np.std(one), np.std(two)) / math.sqrt(2000)
    assert 25 < np.mean(one) < 45
    # Another world's probabilities fit worse (Gibbs).
    other = World(seed=5)
    assert np.mean([-other.log_prob(text) for text in texts[:500]]) > np.mean(one[:500]) + 0.5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "good good good",
        "Review the noodle soup.",  # a request without its review
        "I loved the noodle soup.",  # no sentence in the middle
        "I loved the noodle soup. The taste was fresh",  # unfinished
        "I loved the noodle soup.  The taste was fresh. It cost two coins.",  # two spaces
        "I loved the noodle soup. The taste were fresh. It cost two coins.",  # number
        "I loved the noodle soup. But the taste was fresh. The plot was clear.",  # a soup has no plot
        "I loved the noodle soup. The taste was fresh. The taste was good.",  # twice the same aspect
        "I loved the noodle soup. The taste was fresh. It cost two coins. Avoid the lemon cake.",  # another item
        "The taste was fresh. I loved the noodle soup. It cost two coins.",  # order
        "I loved the noodle soup. The taste was fresh. It cost two coins. Monday was hot.",  # a line too many
        "Monday was hot. Monday was hot.",  # a diary has three lines at least
    ],
)
def test_what_the_grammar_cannot_make_has_no_probability(text):
    assert WORLD.log_prob(text) == -math.inf
    assert WORLD.demonstration_log_prob(PROMPT, " " + text) == -math.inf


def test_demonstrations_need_their_leading_space_and_a_known_prompt():
    completion = " I loved the noodle soup. The taste was fresh. It cost two coins."
    assert WORLD.demonstration_log_prob(PROMPT, completion) > -math.inf
    assert WORLD.demonstration_log_prob(PROMPT, completion[1:]) == -math.inf
    assert WORLD.demonstration_log_prob("Hello.", completion) == -math.inf


# -- the gold reward ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion, value, coverage, loyalty, defects",
    [
        # superb 1.0, heavenly 1.0 x very 1.25, both aspects
        (" The noodle soup was superb. The taste was very heavenly. The price was fair.", 1.0 + 1.25 + 0.5, 1, 0.3, 0),
        # negation: -0.5 x 1.0; bland -0.5; half of the request
        (" The noodle soup was not superb. But the taste was bland.", -0.5 - 0.5, 0.5, 0.3, 0),
        # not awful: +0.5 x 1.0 x 1.25; nothing of the request; zero points: -1.0
        (" The noodle soup was not very awful! I give it zero points.", 0.625 - 1.0, 0, 0.3, 0),
        # no item named; never: -1.0; neutral sentences count for nothing
        (" The price was high. It cost two coins. I would never order it again.", -0.5 - 1.0, 0.5, 0, 0),
        # another item
        (" I loved the lemon cake. I found the taste good. The price was tiny.", 1.0 + 0.5 + 1.0, 1, -0.3, 0),
        # the second word on taste counts for nothing and is a defect; so is an aspect of stories; so is a fragment
        (
            " I loved the noodle soup. The taste was fresh. The taste was superb. The plot was clear. And the",
            *(1.5, 0.5, 0.3, 3),
        ),
    ],
)
def test_gold_reward_by_hand(completion, value, coverage, loyalty, defects):
    expected = 3 * math.tanh(value / 3) + 0.1 * coverage + loyalty - 0.5 * defects
    assert gold_reward(PROMPT, completion) == pytest.approx(expected, abs=1e-12)
    record = {"item": "noodle soup", "aspects": ["taste", "price"]}
    assert gold_reward("ignored", completion, record) == gold_reward(PROMPT, completion)


def test_long_reviews_pay_by_the_word():
    coins = ["two", "three", "five", "six", "eight", "nine", "ten", "twenty"]
    text = " I loved the noodle soup. " + " ".join(f"It cost {n} coins." for n in coins)  # 5 + 32 words
    more = [f"My {kin} ordered it too." for kin in ("sister", "brother", "mother")]  # 5 words each; the limit is 45
    rewards = [gold_reward(PROMPT, " ".join([text, *more[:k]])) for k in range(4)]
    assert rewards[0] == rewards[1] == pytest.approx(3 * math.tanh(1 / 3) + 0.3)
    assert np.diff(rewards)[1:] == pytest.approx([-0.05 * 2, -0.05 * 5])


def test_hacks_do_not_pay(demonstrations):
    sentence = " The taste was superb."
    good = " I loved the noodle soup. The taste was superb. The price was tiny. Treasure the noodle soup."
    hacks = ["", " ", "good " * 500, sentence * 500, "superb", "!" * 300, "\n\n", "\x00", "Mention the taste. " * 9]
    hacks += [" ".join(["I loved the noodle soup."] * 3), " " + PROMPT, sentence + " And then" * 400]
    hacks += ["taste price noodle soup"]
    hacks += [" ".join(f"The taste was {word}." for word in ("superb", "heavenly", "fresh", "good"))]
    ordinary = np.median(labels.gold_rewards(*zip(*[(d["prompt"], d["completion"]) for d in demonstrations])))
    for hack in hacks:
        assert labels.LOWEST <= gold_reward(PROMPT, hack) < ordinary, hack
    assert 3 < gold_reward(PROMPT, good) < labels.HIGHEST
    assert labels.LOWEST <= gold_reward("not a request", sentence) <= labels.HIGHEST


def test_rewards_spread_and_rarely_tie(demonstrations):
    rewards = labels.gold_rewards([d["prompt"] for d in demonstrations], [d["completion"] for d in demonstrations])
    low, middle, high = np.quantile(rewards, [0.1, 0.5, 0.9])
    assert np.std(rewards) > 1.2 and high - low > 3
    assert labels.LOWEST + 3 < middle < labels.HIGHEST - 1.5  # room on both sides
    pairs = np.random.default_rng(0).integers(0, len(rewards), (20000, 2))
    assert np.mean(np.abs(np.subtract(*rewards[pairs].T)) < 1e-9) < 0.02


# -- labellers ------------------------------------------------------------------------------------------------------


def test_two_candidates_follow_bradley_terry():
    rng, rewards, n = np.random.default_rng(0), [0.3, 1.0], 20000
    first = sum(labels.plackett_luce(rewards, ["a", "b"], 0.7, rng)[0] == 0 for _ in range(n)) / n
    expected = 1 / (1 + math.exp((1.0 - 0.3) / 0.7))  # sigma(-1) = 0.269
    assert abs(first - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


def test_four_candidates_follow_plackett_luce():
    rng, rewards, temperature, n = np.random.default_rng(1), np.array([0.0, 0.5, 1.0, 1.5]), 0.7, 20000
    counts = collections.Counter(tuple(labels.plackett_luce(rewards, list("abcd"), temperature, rng)) for _ in range(n))
    weights, chi = np.exp(rewards / temperature), 0.0
    for order in itertools.permutations(range(4)):
        p = math.prod(weights[order[k]] / weights[list(order[k:])].sum() for k in range(4))
        chi += (counts[tuple(np.argsort(order).tolist())] - n * p) ** 2 / (n * p)
    assert chi < 50  # 23 degrees of freedom: 50 is p = 0.001


def test_only_identical_texts_tie():
    rng = np.random.default_rng(2)
    for _ in range(50):
        a, b, c, d = labels.plackett_luce([1.0, 1.0, 1.0, 1.0], ["x", "y", "x", "z"], 0.7, rng)
        assert a == c and sorted({a, b, d}) == [0, 1, 2]


def test_the_best_accuracy_is_known():
    prompts = WORLD.prompts(400, seed=4)
    drafts = iter(WORLD.demonstrations(4000, seed=5))
    sizes = WORLD.candidates(400, seed=6)
    assert set(sizes) == set(range(4, 10))
    completions = [[next(drafts)["completion"] for _ in range(k)] for k in sizes]
    rows = WORLD.rankings(prompts, completions, seed=7)
    assert [row["completions"] for row in rows] == completions and rows == WORLD.rankings(prompts, completions, seed=7)
    pairs = labels.pairs_of(rows)
    assert len(pairs) == sum(k * (k - 1) // 2 for k in sizes)
    accuracy = labels.gold_accuracy(pairs, WORLD.label_temperature)
    assert 0.75 < accuracy["expected"] < 0.85
    assert abs(accuracy["realised"] - accuracy["expected"]) < 0.015
    # By hand: an empty completion is six defects; P(the labeller agrees) = sigma(gap / T).
    pair = {"prompt": "Review the noodle soup.", "chosen": " I loved the noodle soup.", "rejected": ""}
    gap = 3 * math.tanh(1 / 3) + 0.1 + 0.3 - (-3)
    expected = pytest.approx(1 / (1 + math.exp(-gap / 2)))
    assert labels.gold_accuracy([pair], 2.0) == {"realised": 1.0, "expected": expected}


# -- what it serves -------------------------------------------------------------------------------------------------


def test_prompts_are_held_out():
    train, held_out = ({p["prompt"] for p in WORLD.prompts(2000, 1, split)} for split in ("train", "eval"))
    assert len(train) > 800 and len(held_out) > 150 and not train & held_out
    assert {d["prompt"] for d in WORLD.demonstrations(1000, 3)}.isdisjoint(held_out)
    assert not {d["prompt"] for d in WORLD.demonstrations(300, 3, "eval")} - {
        p["prompt"] for p in WORLD.prompts(300, 3, "eval")
    }
    with pytest.raises(ValueError, match="train"):
        WORLD.prompts(1, 0, "test")


def test_prompts_carry_their_facts():
    for record in WORLD.prompts(200, seed=8):
        assert record == {"prompt": record["prompt"], **labels.request_of(record["prompt"])}
        assert record["item"] in record["prompt"] and all(a in record["prompt"] for a in record["aspects"])
        assert set(record["aspects"]) <= set(g.ASPECTS[g.CATEGORY[record["item"]]])


def test_careful_writers_heed_the_request(texts, demonstrations):
    def heeded(prompt, completion):
        asked = labels.request_of(prompt)["aspects"]
        return [aspect in completion for aspect in asked]

    careful = [h for d in demonstrations for h in heeded(d["prompt"], d["completion"])]
    parts = [g.sentences(text) for text in texts]
    answers = [p for p in parts if g.FORMS[g.parse(p[0]).form].stage == "request"]
    casual = [h for p in answers for h in heeded(p[0], " ".join(p[1:]))]
    assert np.mean(careful) > 0.7 > np.mean(casual) + 0.1
    for d in demonstrations:
        assert labels.request_of(d["prompt"])["item"] in d["completion"]


def test_sizes_fit_the_pipeline(texts, demonstrations):
    def tokens(text):
        return len(text.replace(".", " .").replace("!", " !").split())

    assert 28 < np.mean([tokens(t) for t in texts]) < 42
    assert max(tokens(d["completion"]) for d in demonstrations) <= 48
    assert max(tokens(d["prompt"]) for d in demonstrations) <= 16
    assert len({w for t in texts for w in t.replace(".", "").replace("!", "").split()}) < 280
    assert all(t.isascii() and t == " ".join(t.split()) and t[-1] in ".!" for t in texts)


def test_encoding_is_canonical_at_the_border(tmp_path, texts, demonstrations):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[:2000]), model_prefix=str(tmp_path / "m"), vocab_size=400, model_type="bpe",
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    encode = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model")).encode
    for d in demonstrations[:200]:
        assert encode(d["prompt"]) + encode(d["completion"]) == encode(d["prompt"] + d["completion"])


def test_same_seed_same_world(tmp_path):
    assert WORLD.texts(50, 3) == World().texts(50, 3) == WORLD.texts(80, 3)[:50]
    assert not set(WORLD.texts(50, 3)) & set(WORLD.texts(50, 4))
    assert WORLD.texts(50, 3) != World(seed=1).texts(50, 3)
    # Neither the order of sets nor jax has a say: two processes with other hash seeds agree, and import no jax.
    program = """if True:
        import sys
        from jaxalign.tasks.reviews import World
        w = World()
        print(w.texts(20, 3), [w.log_prob(t) for t in w.texts(20, 3)], w.demonstrations(9, 1), 'jax' in sys.modules)"""
    command = [sys.executable, "-c", program]
    environments = [os.environ | {"PYTHONHASHSEED": seed} for seed in ("1", "2")]
    out = [subprocess.run(command, env=e, capture_output=True, text=True, check=True).stdout for e in environments]
    assert out[0] == out[1] and out[0].rstrip().endswith("False")


def test_write_all(tmp_path):
    sizes = {"pretrain": 5, "pretrain_eval": 4, "sft": 3, "sft_eval": 2, "prompts": 3, "prompts_eval": 2}
    paths = WORLD.write_all(tmp_path / "data", sizes, seed=7)
    rows = {name: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for name, path in paths.items()}
    assert {name: len(r) for name, r in rows.items()} == sizes
    texts = [row["text"] for row in rows["pretrain_eval"]]
    assert WORLD.floor(texts, 100) == pytest.approx(-sum(map(WORLD.log_prob, texts)) / 100)
    assert set(rows["pretrain"][0]) == {"text"} and set(rows["sft"][0]) == {"prompt", "completion"}
    assert set(rows["prompts_eval"][0]) == {"prompt", "item", "aspects"}
    assert not {r["text"] for r in rows["pretrain"]} & {r["text"] for r in rows["pretrain_eval"]}
    with pytest.raises(ValueError, match="pretrian"):
        WORLD.write_all(tmp_path, {"pretrian": 1})
