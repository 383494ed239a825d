"""Rewards that are rules: each against cases worked out by hand; data that keeps its promises."""

import json

import pytest

from jaxalign.data import tokenizers
from jaxalign.tasks import arithmetic, synthetic


def test_solve():
    # 2 + 3 * 4 - 5 = 9; products of several; a leading zero is still a number
    assert [arithmetic.solve(x) for x in ("12+34=", "2+3*4-5=", "7-9", "2*3*4-1*5", "007+1")] == [46, 9, -2, 19, 8]
    for bad in ("", "=", "1+", "+1", "1//2", "a+b=", "1+2=3", "__import__('os')"):
        with pytest.raises(ValueError):
            arithmetic.solve(bad)


def test_verify_wants_the_number_and_nothing_else():
    assert arithmetic.verify("47+38=", "85") == 1.0
    assert not any(arithmetic.verify("47+38=", x) for x in ("", "8", "85 ", "085", "850", "=85"))
    assert arithmetic.verify("3-5=", "-2") == 1.0


@pytest.mark.parametrize("options", [{}, {"digits": 3, "operations": "+-"}, {"digits": 1, "terms": 3, "operations": "+-*"}])
def test_problems(options):
    w = arithmetic.World(**options)
    train, held_out = w.problems(400, 1), w.problems(200, 2, "eval")
    assert not {p["prompt"] for p in train} & {p["prompt"] for p in held_out}
    assert train == w.problems(400, 1) != w.problems(400, 3)
    assert all(arithmetic.verify(p["prompt"], p["answer"]) for p in train + held_out)
    numbers = [int(x) for p in train for x in arithmetic.re.findall(r"\d+", p["prompt"])]
    assert max(numbers) < 10**w.digits and len(numbers) == 400 * w.terms
    assert {c for p in train for c in p["prompt"]} <= set(arithmetic.ALPHABET)


def test_the_arithmetic_files(tmp_path):
    paths = arithmetic.World().write_all(tmp_path, {"sft": 20, "prompts": 30, "answers": 30, "prompts_eval": 10})
    rows = {k: [json.loads(x) for x in p.read_text().splitlines()] for k, p in paths.items()}
    assert [r["prompt"] for r in rows["answers"]] == [r["prompt"] for r in rows["prompts"]]
    assert all(arithmetic.verify(r["prompt"], r["completion"]) for r in rows["sft"] + rows["answers"])
    t = tokenizers.load(str(tmp_path / "tokenizer.json"))
    assert t.vocab_size == 16 and t.decode(t.encode("12+3*4=24")) == "12+3*4=24"


def test_careless_writers(tmp_path):
    w = arithmetic.World(mistakes=0.3, operations="+-")
    rows = w.demonstrations(3000, 1)
    right = [(r["completion"], str(arithmetic.solve(r["prompt"]))) for r in rows]
    digits = [a == b for said, true in right for a, b in zip(said, true, strict=True) if b != "-"]
    assert 1 - sum(digits) / len(digits) == pytest.approx(0.3, abs=0.03)  # 0.46 / sqrt(5000) = 0.0065
    assert [r["prompt"] for r in rows] == [p["prompt"] for p in w.problems(3000, 1)]
    # what they write has the probability that they say it has: of one digit, all nine mistakes and the right one
    assert sum(arithmetic.math.exp(w.demonstration_log_prob("3+4=", str(d))) for d in range(10)) == pytest.approx(1)
    assert arithmetic.math.exp(w.demonstration_log_prob("3-5=", "-2")) == pytest.approx(0.7)
    assert w.demonstration_log_prob("3-5=", "2") == w.demonstration_log_prob("9+9=", "1") == -arithmetic.math.inf
    assert arithmetic.World().demonstration_log_prob("3+4=", "8") == -arithmetic.math.inf


def test_increasing():
    # over max(words, 20 / 2): three of the first run, in ten; a run of twelve in twelve words; a word that is no number counts as a word
    assert synthetic.increasing("1 2 3 2 9") == 0.3
    assert synthetic.increasing(" ".join(map(str, range(12)))) == 1.0
    assert synthetic.increasing("so 4 then 5 and 5 6 7 8 9 10 11") == 2 / 12
    assert synthetic.increasing("-1 0.5 2e1") == 0.3 and synthetic.increasing("no number") == 0 and synthetic.increasing("") == 0
    assert synthetic.increasing("1 2", min_tokens=4) == 1.0


def test_date():
    assert synthetic.date(">", "it was on 2021-05-12.") == 1 and synthetic.date(">", "x12021-05-123") == 1
    assert synthetic.date(">", "12 may 2021") == 0 and synthetic.date("2021-05-12", "") == 0


@pytest.mark.parametrize("kind, low, high", [(synthetic.Increasing, 0.1, 0.35), (synthetic.Dates, 0.03, 0.2)])
def test_the_corpora_are_read_back_and_far_from_the_best(kind, low, high, tmp_path):
    w = kind()
    paths = w.write_all(tmp_path, {"sft": 300, "prompts": 5})
    rows = [json.loads(x) for x in paths["sft"].read_text().splitlines()]
    t = tokenizers.load(str(tmp_path / "tokenizer.json"))
    assert all(t.decode(t.encode(r["prompt"] + r["completion"])) == r["prompt"] + r["completion"] for r in rows)
    assert low < w.gold_rewards([r["prompt"] for r in rows], [r["completion"] for r in rows]).mean() < high
