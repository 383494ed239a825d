"""What is chosen out of groups of answers, against plain loops; rivals; judges that see two answers at a time."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxalign import shard
from jaxalign.objectives.preference import pair_logps
from jaxalign.rl import comparisons, rivals, selection
from jaxalign.rl.experience import token_logps
from jaxalign.rl.rollout import Sampling, generate
from jaxalign.types import Prompts, Rollout, UserError

MESH = shard.make_mesh({}, jax.devices()[:1])
N, G, T = 4, 5, 8
NAN = math.nan
SCORES = np.array([[0.1, 0.9, -1, 0.9, 0.3], [2, 2, 2, 2, 2], [NAN, 1, NAN, 0, 3], [NAN] * 5], np.float32)


def rollout(n=N, g=G):
    """Answers to prompts of two tokens; answer 3 of every group repeats answer 1."""
    r = np.random.default_rng(0)
    tokens = r.integers(4, tiny.V, (n, g, T)).astype(np.int32)
    length = r.integers(3, T + 1, (n, g, 1))
    tokens[..., :2] = tokens[:, :1, :2]
    if g > 3:
        tokens[:, 3], length[:, 3] = tokens[:, 1], length[:, 1]
    flat = lambda x: x.reshape(n * g, T)
    t = np.arange(T)
    real = t < length
    mask = (real & (t >= 2)).astype(np.float32)
    zero = np.zeros((n * g, T), np.float32)
    return Rollout(flat(np.where(real, tokens, 0)), flat(mask), flat(real.astype(np.int32)), flat(np.where(real, t, 0)), zero, np.arange(n * g, dtype=np.int32), np.int32(0), np.zeros(n * g, np.float32))


def test_the_best_against_the_worst():
    x, ref = rollout(), tiny.init(tiny.LLAMA, 9)
    pairs, metrics = selection.pair_experience(tiny.LLAMA, None, ref, x, SCORES.reshape(-1), group=G)
    tokens = x.tokens.reshape(N, G, T)
    for row, (best, worst) in {0: (1, 2), 2: (4, 3)}.items():
        np.testing.assert_array_equal(pairs.chosen.tokens[row], tokens[row, best])
        np.testing.assert_array_equal(pairs.rejected.tokens[row], tokens[row, worst])
        assert pairs.chosen.mask[row].sum() and pairs.rejected.mask[row].sum()
    for row in (1, 3):  # a tie; nothing scorable
        assert not np.any(pairs.chosen.mask[row]) and not np.any(pairs.rejected.mask[row])
    np.testing.assert_allclose(pairs.margin, [1.9, 0, 3, 0], rtol=1e-6)
    np.testing.assert_allclose(pairs.ref_chosen, pair_logps(tiny.LLAMA, ref, pairs)[0], rtol=1e-6)
    np.testing.assert_allclose([metrics["objective/ties"], metrics["objective/scores"]], [0.5, np.nanmean(SCORES)], rtol=1e-6)
    # Where no penalty nor a clip makes a difference; here a clip makes a tie of all
    assert not np.any(selection.pair_experience(tiny.LLAMA, None, None, x, np.abs(SCORES.reshape(-1)) + 1, group=G, clip_score=1.0)[0].chosen.mask)


def test_against_a_rival():
    x, ref = rollout(N, 2), tiny.init(tiny.LLAMA, 9)
    s = np.array([[1, 0], [0, 2], [1, 1], [NAN, 1]], np.float32)
    batch, metrics = selection.rival_pairs(tiny.LLAMA, None, ref, x, s.reshape(-1), group=1)
    tokens = x.tokens.reshape(N, 2, T)
    np.testing.assert_array_equal(batch.rival_won[:2], [0, 1])
    np.testing.assert_array_equal(batch.chosen.tokens[:2], tokens[[0, 1], [0, 1]])
    assert not np.any(batch.chosen.mask[2:])
    np.testing.assert_allclose([metrics["objective/model_scores"], metrics["objective/ref_scores"]], [2 / 3, 1], rtol=1e-6)
    out, _ = selection.duels(tiny.LLAMA, None, ref, x, s.reshape(-1), group=1, temperature=0.7)
    sigma = lambda z: 1 / (1 + np.exp(-z))
    np.testing.assert_allclose(out.preferred, [sigma(1), sigma(-2), 0.5, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(out.tokens, tokens[:, 0])
    assert np.asarray(out.mask).any(1).tolist() == [True, True, True, False]
    np.testing.assert_allclose(out.ref_logp[:3], token_logps(tiny.LLAMA, ref, out, temperature=0.7).logp[:3], atol=1e-6)


def kept(scores, tokens, keep, quantile, threshold):
    """The rule in a loop: {prompt: answers}."""
    floor = -np.inf if not quantile else np.nanquantile(scores, quantile)
    out = []
    for s, t in zip(scores, tokens):
        seen, fit = set(), []
        for g in range(len(s)):
            if t[g].tobytes() in seen:
                continue
            seen.add(t[g].tobytes())
            if not np.isnan(s[g]) and s[g] >= floor and (threshold is None or s[g] >= threshold):
                fit.append(g)
        out.append(sorted(fit, key=lambda g: -s[g])[:keep])
    return out


@pytest.mark.parametrize("keep, quantile, threshold", [(1, 0.0, None), (3, 0.0, 0.3), (G, 0.6, None), (2, 0.0, 5.0), (G, 0.0, None)])
def test_the_best_as_demonstrations(keep, quantile, threshold):
    x = rollout()
    rows, metrics = selection.best_experience(tiny.LLAMA, None, None, x, SCORES.reshape(-1), group=G, keep=keep, quantile=quantile, threshold=threshold)
    tokens, mask = x.tokens.reshape(N, G, T), x.mask.reshape(N, G, T)
    want = kept(SCORES, tokens, keep, quantile, threshold)
    for n in range(N):
        for k in range(keep):
            row = n * keep + k
            if k < len(want[n]):
                np.testing.assert_array_equal(rows.tokens[row], tokens[n, want[n][k]])
                np.testing.assert_array_equal(rows.mask[row], mask[n, want[n][k]])
            else:
                assert not np.any(rows.mask[row])
    np.testing.assert_allclose([metrics["kept/share"], metrics["kept/prompts"]], [sum(map(len, want)) / (N * G), np.mean([bool(w) for w in want])], rtol=1e-6)


HOW = Sampling(6, (3,), temperature=0.8)
PROMPTS = Prompts(np.array([[5, 6, 7], [8, 9, 0]], np.int32), np.array([[1, 1, 1], [1, 1, 0]], np.int32), np.array([[0, 1, 2], [0, 1, 0]], np.int32), np.arange(2, dtype=np.int32))


@pytest.mark.parametrize("model", [tiny.LLAMA, tiny.GPT2], ids=["rope", "learned positions"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_mixture_is_sampled_from_the_mixed_logits(model, share):
    """Token by token from one forward over the text so far of each model, without a cache; ends 0 and 1 are the models themselves."""
    policy, ref = tiny.init(model, 0), tiny.init(model, 9)
    key = jax.random.key(4)
    got = rivals.mixture(model, HOW, policy, ref, PROMPTS, key, 0, mixture=share)
    if share in (0, 1):
        want = generate(model, HOW, (policy, ref)[int(share)], PROMPTS, key, 0)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_allclose(got.logp, want.logp, atol=1e-5)
        return
    from jaxalign.rl.rollout import uniforms
    from jaxalign.ops.sampling import draw

    u = uniforms(key, PROMPTS.row, jnp.arange(HOW.max_new))

    def logits(params, ids):
        T = len(ids)
        x = model.hidden(params, jnp.array([ids]), jnp.ones((1, T), jnp.int32), jnp.arange(T)[None]).x[:, -1]
        from jaxalign.ops.logprob import next_logits

        return next_logits(x, model.unembed(params))

    for row in range(2):
        ids = [int(i) for i, s in zip(PROMPTS.tokens[row], PROMPTS.segments[row]) if s]
        for t in range(HOW.max_new):
            z = (1 - share) * logits(policy, ids) + share * logits(ref, ids)
            token, logp = draw(u[t, row : row + 1], z, HOW.temperature)
            at = len(ids)
            assert int(got.tokens[row, at]) == int(token[0])
            np.testing.assert_allclose(got.logp[row, at], logp[0], atol=1e-4)
            ids.append(int(token[0]))
            if int(token[0]) in HOW.stop:
                break
        assert np.asarray(got.segments[row]).sum() == len(ids)


def test_rivals_that_need_what_is_not_there_say_so():
    args = (None, PROMPTS, jax.random.key(0), 0)
    with pytest.raises(UserError, match="beta"):
        rivals.reference(tiny.LLAMA, HOW, tiny.init(tiny.LLAMA), *args)
    with pytest.raises(UserError, match="rl.mixture 2"):
        rivals.mixture(tiny.LLAMA, HOW, tiny.init(tiny.LLAMA), *args, mixture=2.0)
    with pytest.raises(UserError, match="slots"):
        rivals.mixture(tiny.LLAMA, Sampling(3, slots=2), tiny.init(tiny.LLAMA), *args)


words = lambda ids: " ".join(map(str, ids))  # noqa: E731


def test_a_judge_of_two_answers():
    """With a Bradley-Terry judge the scores are its strengths, centred; whatever the order in which it was shown them."""
    x = rollout()
    strength = lambda text: sum(map(int, text.split())) / 20
    shown = []

    def judge(prompt, first, second, record):
        shown.append((first, second))
        return 1 / (1 + math.exp(strength(second) - strength(first)))

    prompts = SimpleNamespace(records=())
    got = np.asarray(comparisons.pairwise(judge, words, MESH, G)(x, prompts)).reshape(N, G)
    want = np.array([strength(words(t[m > 0])) for t, m in zip(x.tokens, x.mask)]).reshape(N, G)
    np.testing.assert_allclose(got, want - want.mean(1, keepdims=True), rtol=1e-4, atol=1e-5)
    assert {f > s for f, s in shown} == {True, False}
    two = rollout(N, 2)
    p = np.asarray(comparisons.pairwise(lambda *_: 0.8, words, MESH, 2)(two, prompts)).reshape(N, 2)
    gap = 1 / (1 + np.exp(-np.abs(p[:, 0] - p[:, 1])))
    np.testing.assert_allclose(gap, 0.8, rtol=1e-5)
    assert not np.any(np.asarray(comparisons.pairwise(lambda *_: NAN, words, MESH, 2)(two, prompts)))
    sure = np.asarray(comparisons.pairwise(lambda *_: 1, words, MESH, 2)(two, prompts))
    assert np.isfinite(sure).all()
    for bad, text in ((lambda *_: 3.0, "3.0"), (lambda *_: 1 / 0, "ZeroDivisionError")):
        with pytest.raises(UserError, match=text):
            comparisons.pairwise(bad, words, MESH, 2)(two, prompts)
