"""Distinct-n by hand; BLEU as sacrebleu recorded it; self-BLEU as BLEU against all others."""

import re

import numpy as np
import pytest
import recordings

from jaxalign.evals import diversity

RECORDED = recordings.load("text_metrics.json", "hypotheses", "references", "second_references", "sacrebleu_*")
words = lambda texts: [re.findall(r"\w+|[^\w\s]", t) for t in texts]  # sacrebleu's 13a, on texts as plain as these
HYPOTHESES, REFERENCES, SECOND = (words(RECORDED[k]) for k in ("hypotheses", "references", "second_references"))


def test_distinct():
    # bigrams: a b, b a, a b | a b: 2 of 4
    assert diversity.distinct(["a b a b", "a b"], 2) == 0.5 and diversity.distinct(["a"], 2) == 0
    assert diversity.distinct_within(["a b a b", "a b", "a"], 2) == pytest.approx((2 / 3 + 1) / 2)
    assert diversity.distinct([[1, 2], [2, 1]], 1) == 0.5


def test_bleu_as_recorded():
    assert diversity.bleu(HYPOTHESES, [[r] for r in REFERENCES]) == pytest.approx(RECORDED["sacrebleu_corpus/score"], rel=1e-9)
    assert diversity.bleu(HYPOTHESES, list(zip(REFERENCES, SECOND))) == pytest.approx(RECORDED["sacrebleu_corpus_two_refs"], rel=1e-9)
    each = [diversity.bleu([h], [[r]], effective_order=True) for h, r in zip(HYPOTHESES, REFERENCES)]
    np.testing.assert_allclose(each, RECORDED["sacrebleu_sentence"], rtol=1e-9)


def test_what_bleu_is_made_of_as_recorded():
    """Matches, n-grams and lengths; from them precisions and the penalty of brevity. Its words are those of `words`, its smoothing ours."""
    corpus = lambda k: RECORDED[f"sacrebleu_corpus/{k}"]
    matched, total, length, wanted = diversity.bleu_counts(HYPOTHESES, [[r] for r in REFERENCES])
    assert (matched.tolist(), total.tolist(), length, wanted) == (corpus("counts"), corpus("totals"), corpus("sys_len"), corpus("ref_len"))
    np.testing.assert_allclose(100 * matched / total, corpus("precisions"), rtol=1e-9)
    np.testing.assert_allclose(min(1, np.exp(1 - wanted / length)), corpus("bp"), rtol=1e-9)
    assert (corpus("tokenize"), corpus("smooth_method")) == ("13a", "exp")


def test_bleu_at_its_ends():
    assert diversity.bleu(["a b c d"], [["a b c d"]]) == pytest.approx(100) and diversity.bleu(["a b"], [["a b"]]) == 0 and diversity.bleu(["x"], [["y"]]) == 0
    assert diversity.bleu(["a b"], [["a b"]], effective_order=True) == pytest.approx(100) and diversity.bleu([""], [["a"]]) == 0


def test_self_bleu_is_bleu_against_all_others():
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 6, rng.integers(1, 20)).tolist() for _ in range(12)] + HYPOTHESES
    expect = [diversity.bleu([t], [texts[:i] + texts[i + 1 :]], effective_order=True) for i, t in enumerate(texts)]
    assert diversity.self_bleu(texts) == pytest.approx(np.mean(expect))
    assert diversity.self_bleu(["a b c d e"] * 3) == pytest.approx(100) and diversity.self_bleu(["a b c d", "e f g h"]) == 0
