"""Speculative decoding: greedy token for token, and the model's distribution whatever the draft."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from test_rollout import KEY, LENGTHS, B, N, forward, many, next_token, prompts, sharp
from jaxalign.models import decoder
from jaxalign.rl import engine, speculative
from jaxalign.rl.rollout import Sampling, generate
from jaxalign.types import UserError

MODELS = {"llama": tiny.LLAMA, "gpt2": tiny.GPT2}


def drafts(kind):
    """bad: an untrained model of other weights: mostly refused. self: the model, always kept."""
    if kind == "ngram":
        return {}
    return {"draft": tiny.LLAMA, "draft_params": sharp(tiny.LLAMA) if kind == "self" else tiny.init(tiny.LLAMA, seed=9)}


@pytest.mark.parametrize("name, kind", [("llama", "ngram"), ("gpt2", "ngram"), ("gpt2", "bad"), ("llama", "self")])
def test_greedy_is_plain_greedy(name, kind):
    """Left- and right-padded, with stop ids that a draft may run past."""
    model = MODELS[name]
    how = Sampling(N, (3, 5), temperature=0, pad=11, draft_tokens=3)
    want = generate(model, how, sharp(model), prompts(), KEY, 5)
    for left in (False, True):
        got, metrics = speculative.generate(model, how, sharp(model), prompts(left), KEY, 5, **drafts(kind))
        for field, x, y in zip(want._fields, got, want):
            np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=1e-4, err_msg=field)
        assert kind != "self" or (metrics["speculative/acceptance"] == 1 and metrics["speculative/tokens_per_call"] > 1.3)


@pytest.mark.parametrize("kind", ["ngram", "bad"])
def test_the_distribution_is_the_models(kind):
    """Chi-square over the first token of 4096 draws and over the second after the commonest first, as in test_rollout: at
    most 15 degrees of freedom, P(chi2 > 45) < 1e-4. The log-probs are the model's."""
    how = Sampling(2, (), 1.0, draft_tokens=2)
    out, metrics = speculative.generate(tiny.LLAMA, how, sharp(tiny.LLAMA), many(), KEY, **drafts(kind))
    out, n = jax.tree.map(np.asarray, out), LENGTHS[2]
    assert 0.01 < metrics["speculative/acceptance"] < 0.99, "a draft that is always or never kept shows nothing"

    def chi(tokens, p):
        seen, big = np.bincount(tokens, minlength=tiny.V), p * len(tokens) >= 5
        return ((seen - len(tokens) * p)[big] ** 2 / (len(tokens) * p[big])).sum()

    first = out.tokens[:, n]
    assert chi(first, next_token(1.0)) < 45
    np.testing.assert_allclose(out.logp[:, n], np.log(next_token(1.0)[first]), atol=1e-4)
    common = np.bincount(first).argmax()
    seq = np.array([[*prompts(rows=[2]).tokens[0, :n], common]], np.int32)
    z = np.asarray(forward(tiny.LLAMA, sharp(tiny.LLAMA), seq, np.array([n + 1])), np.float64)[0, n]
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    second = out.tokens[first == common, n + 1]
    assert len(second) > 200 and chi(second, p) < 45


def test_truncation_is_kept():
    """top_k 3: nothing but the three largest, in their proportions (2 degrees of freedom: P(chi2 > 20) < 1e-4)."""
    how = Sampling(1, (), 1.0, top_k=3, draft_tokens=2)
    first = np.asarray(speculative.generate(tiny.LLAMA, how, sharp(tiny.LLAMA), many(), KEY, **drafts("bad"))[0].tokens)[:, LENGTHS[2]]
    p = next_token(1.0)
    p = np.where(p >= np.sort(p)[-3], p, 0)
    p /= p.sum()
    seen = np.bincount(first, minlength=tiny.V)
    assert not seen[p == 0].any() and ((seen - B * p)[p > 0] ** 2 / (B * p[p > 0])).sum() < 20


def test_a_draw_depends_on_its_row_alone():
    how = Sampling(N, (3,), 1.0, draft="ngram", draft_tokens=2)
    run = lambda rows: engine.generate(tiny.LLAMA, how, sharp(tiny.LLAMA), prompts(rows=rows), KEY)
    a, b = run([0, 1, 2, 3, 4, 5]), run([5, 3, 1, 0, 2, 4])
    np.testing.assert_array_equal(np.asarray(a.tokens)[[5, 3, 1, 0, 2, 4]], np.asarray(b.tokens))


def test_another_vocabulary_is_refused():
    small = decoder.model(vocab=tiny.V + 1, dim=8, layers=1, heads=1, hidden=8)
    with pytest.raises(UserError, match="vocabulary"):
        speculative.generate(tiny.LLAMA, dataclasses.replace(Sampling(1), draft="x"), None, prompts(), KEY, draft=small)
