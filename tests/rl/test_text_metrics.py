"""Text metrics against the numbers that their own libraries gave (`vectors/text_metrics.json`), and without the libraries."""

import sys

import numpy as np
import pytest
import recordings
from jaxalign.rl import text_metrics as tm
from jaxalign.types import UserError

V = recordings.load("text_metrics.json", "hypotheses", "references", "second_references", "rouge/*", "sacrebleu_corpus/score", "sacrebleu_corpus_two_refs", "sacrebleu_sentence", "chrf_corpus")
SAID, WANT = V["hypotheses"], V["references"]
BOTH = [list(x) for x in zip(WANT, V["second_references"])]


@pytest.mark.parametrize("stem", [False, True])
def test_rouge(stem):
    pytest.importorskip("rouge_score")
    for said, want, numbers in zip(SAID, WANT, V["rouge/stemmer" if stem else "rouge/no_stemmer"]):
        got = tm.rouge(said, want, stem=stem)
        for kind in tm.KINDS:
            np.testing.assert_allclose(got[kind], numbers[kind], atol=1e-6, err_msg=f"{kind}: {said!r}")
            reward = {"rouge1": tm.rouge1, "rouge2": tm.rouge2, "rougeL": tm.rouge_l, "rougeLsum": tm.rouge_lsum}[kind]
            np.testing.assert_allclose(reward("", said, {"reference": want, "stem": stem}), numbers[kind][2], atol=1e-6)
    assert tm.rouge1("", "a b", {"references": ["c", "a b"]}) == 1


def test_sacrebleu():
    pytest.importorskip("sacrebleu")
    np.testing.assert_allclose(tm.corpus_bleu(SAID, [[w] for w in WANT]), V["sacrebleu_corpus/score"], rtol=1e-9)
    np.testing.assert_allclose(tm.corpus_bleu(SAID, BOTH), V["sacrebleu_corpus_two_refs"], rtol=1e-9)
    np.testing.assert_allclose(tm.corpus_chrf(SAID, [[w] for w in WANT]), V["chrf_corpus"], rtol=1e-9)
    got = [100 * tm.bleu("", s, {"reference": w}) for s, w in zip(SAID, WANT)]
    np.testing.assert_allclose(got, V["sacrebleu_sentence"], rtol=1e-9, atol=1e-9)
    # one word of four replaced: a quarter of an edit per word; nothing to do: 0
    assert tm.ter("", "the cat sat here", {"reference": "the cat sat there"}) == -0.25 == -tm.corpus_ter(["the cat sat here"], [["the cat sat there"]]) / 100
    assert tm.ter("", "a b", {"reference": "a b"}) == 0 and tm.chrf("", "a b", {"reference": "a b"}) == 1


class NoSynonyms:
    """Stands for a WordNet in which no two words mean the same."""

    def synsets(self, word):
        return []


def test_meteor():
    """Two words, both matched in one run: F 1, penalty 0.5 (1/2)^3, so 0.9375. One of two found: P 1/2, R 1/2, F 1/2, less half."""
    pytest.importorskip("nltk")
    meteor = lambda a, b: tm.meteor("", a, {"reference": b}, wordnet=NoSynonyms())  # noqa: E731
    assert meteor("the cat", "the cat") == pytest.approx(0.9375)
    assert meteor("the dog", "the cat") == pytest.approx(0.5 * 0.5)


def test_meteor_says_what_it_lacks(monkeypatch):
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [])
    import nltk.corpus

    if "LazyCorpusLoader" not in type(nltk.corpus.wordnet).__name__:
        pytest.skip("WordNet is loaded here")
    with pytest.raises(UserError, match="nltk.download"):
        tm.meteor("", "a", {"reference": "a"})


def test_what_is_missing_is_named(monkeypatch):
    for name in ("rouge_score", "sacrebleu", "nltk"):
        monkeypatch.setitem(sys.modules, name, None)
    tm._scorer.cache_clear()
    for reward in (tm.rouge_l, tm.bleu, tm.chrf, tm.ter, tm.meteor):
        with pytest.raises(UserError, match=r"jaxalign\[metrics\]"):
            reward("", "a", {"reference": "a"})
    tm._scorer.cache_clear()
    for record in ({"answer": "a"}, {"references": []}):
        with pytest.raises(ValueError, match="no 'reference'"):
            tm._references(record)
    assert tm._references({"references": [], "summary": "a"}) == ["a"] and tm._references({"reference": ""}) == [""]
