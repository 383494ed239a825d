"""Sampling under a masking policy, and by Q heads: two caches, one text; decoding agrees with the full forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxalign.models import decoder, heads, t5
from jaxalign.objectives import nlpo
from jaxalign.ops import nn
from jaxalign.ops.allowed import NEVER, Rule
from jaxalign.ops.masked import masked_mean
from jaxalign.rl import masking
from jaxalign.rl.rollout import Sampling, generate
from jaxalign.rl.stream import stream
from jaxalign.train import step
from jaxalign.types import Experience, Prompts

V = tiny.V
T5 = t5.model(vocab=V, dim=16, layers=1, encoder_layers=1, heads=2, hidden=16)
SCANNED = decoder.model(vocab=V, dim=16, layers=2, heads=2, hidden=16, scan=True)
MODELS = {"llama": tiny.LLAMA, "scanned": SCANNED, "t5": T5}
P, N = 5, 6
RULE = Rule("learned_top_p", 0.4, 2, (3,))


def prompts(name, rows=6):
    r = np.random.default_rng(0)
    length = r.integers(2, P + 1, rows)[:, None]
    real = np.arange(P) < length
    tokens = np.where(real, r.integers(1, V, (rows, P)), 0)
    if name == "t5":
        tokens[np.arange(rows), length[:, 0] - 1] = 0
    return Prompts(tokens.astype(np.int32), real.astype(np.int32), np.where(real, np.arange(P), 0).astype(np.int32), np.arange(rows, dtype=np.int32))


def draw(model, seed=0):
    return tiny.loud(jax.jit(lambda k: nn.init(model.specs(), k))(jax.random.key(seed)))


def whole(model, params, rollout):
    """f32[B,T,V]: what the token at each place was drawn from, by one forward over the finished text."""
    x = model.hidden(params, *rollout[:1], *rollout[2:4]).x
    z = model.next_logits(params, x[:, :-1].reshape(-1, x.shape[-1])).T.reshape(x.shape[0], x.shape[1] - 1, -1)
    return jnp.pad(z, ((0, 0), (1, 0), (0, 0)))


def both(name):
    model = masking.Masked(MODELS[name], RULE)
    return model, {"policy": draw(MODELS[name]), "masking": draw(MODELS[name], 1)}


def guided(name, **how):
    model = heads.Guided(MODELS[name], **how)
    return model, draw(model)


CASES = {**{f"masked {n}": functools.partial(both, n) for n in MODELS}, "guided llama": lambda: guided("llama", beta=4.0, clip=0.1), "guided t5": lambda: guided("t5", beta=2.0)}


@pytest.mark.parametrize("case", CASES)
def test_decoding_is_the_full_forward(case):
    """Sampled tokens' log-probs, and greedy tokens; no token that the masking policy removes is ever written."""
    model, params = CASES[case]()
    asked = prompts(case.split()[1])
    run = jax.jit(lambda p, r: whole(model, p, r))
    for how in [Sampling(N, (2,), temperature=0.7)] * ("t5" not in case or "masked" in case) + [Sampling(N, (2,), temperature=0.0)] * ("masked" not in case):
        got = generate(model, how, params, asked, jax.random.key(1))
        z = np.asarray(run(params, got)) / (how.temperature or 1.0)
        logp = jnp.take_along_axis(jax.nn.log_softmax(z), got.tokens[..., None], -1)[..., 0]
        written = np.asarray(got.mask) > 0
        np.testing.assert_allclose(np.where(written, got.logp, 0), np.where(written, logp, 0), atol=2e-4)
        if "masked" in case:
            own = jnp.take_along_axis(jnp.asarray(z), got.tokens[..., None], -1)[..., 0]
            assert (np.asarray(own)[written] > NEVER / 2).all() and (z[written] < NEVER / 2).any()
        if how.temperature == 0:
            top = np.sort(z, -1)
            sure = written & (top[..., -1] - top[..., -2] > 1e-3)
            assert sure.sum() > 6
            np.testing.assert_array_equal(z.argmax(-1)[sure], np.asarray(got.tokens)[sure])


def test_guided_by_hand():
    """log pi + beta min(min Q - V, clip), then top_k, then the temperature; beta 0 is the trunk."""
    for clip in (None, 0.05):
        model, params = guided("llama", beta=3.0, clip=clip)
        x = np.random.default_rng(2).standard_normal((4, 16)).astype(np.float32)
        q, v = heads.q_values(params["q"], x).min(0), heads.v_values(params["v"], x)
        u = model.unembed(params)
        advantage = np.minimum(q - v[:, None], np.inf if clip is None else clip)
        want = jax.nn.log_softmax((x @ u.weight.T) * u.scale) + 3.0 * advantage
        np.testing.assert_allclose(model.next_logits(params, x).T, want, rtol=1e-4, atol=1e-5)
    asked, how, key = prompts("llama"), Sampling(N, (2,)), jax.random.key(3)
    plain = generate(tiny.LLAMA, how, params["trunk"], asked, key)
    for m, p in ((heads.Guided(tiny.LLAMA, beta=0.0), params), (heads.Guided(tiny.LLAMA, twins=0), params)):
        np.testing.assert_array_equal(generate(m, how, p, asked, key).tokens, plain.tokens)
    few = generate(model, Sampling(N, (2,), top_k=1), params, asked, key)
    np.testing.assert_array_equal(few.tokens, generate(model, Sampling(N, (2,), temperature=0.0), params, asked, key).tokens)
    one = list(stream(model, how, params, asked.tokens[0][asked.segments[0] > 0], key, row=0))
    told = generate(model, how, params, asked, key)
    np.testing.assert_array_equal(one, np.asarray(told.tokens[0])[np.asarray(told.mask[0]) > 0])


def test_all_allowed_is_the_plain_sampler():
    params = draw(tiny.LLAMA)
    asked, how, key = prompts("llama"), Sampling(N, (2,)), jax.random.key(3)
    free = masking.Masked(tiny.LLAMA, Rule("learned_top_p", 1.0, 1))
    a = generate(free, how, {"policy": params, "masking": draw(tiny.LLAMA, 1)}, asked, key, group=2)
    b = generate(tiny.LLAMA, how, params, asked, key, group=2)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)


def test_the_first_minibatch_has_ratio_one():
    model, policy = both("llama")
    params, frozen = {"policy": policy["policy"], "value": draw_head()}, {}
    rollout = generate(model, Sampling(N, (2,), temperature=0.7), policy, prompts("llama", 8), jax.random.key(5))
    aux = {"policy": policy["masking"]}
    seen = masking.beside(frozen)(params, aux)
    scores = np.random.default_rng(6).standard_normal(8).astype(np.float32)
    exp, metrics = masking.nlpo_experience(model, None, seen, draw(tiny.LLAMA, 2), rollout, scores, 0.1, temperature=0.7)
    assert isinstance(exp, Experience) and metrics["logprob_gap"] < 1e-4 and 2 <= metrics["objective/allowed"] < V
    o = nlpo.nlpo(tiny.LLAMA, mask_type=RULE.mask_type, top_mask=RULE.top_mask, min_tokens_to_keep=RULE.min_tokens_to_keep, special=RULE.special, temperature=0.7)
    m = jax.jit(lambda p: step.gradient(o, p, {}, aux, exp, jax.random.key(0))[1])(params)
    np.testing.assert_allclose(m["val/ratio"], 1, atol=1e-6)
    assert m["policy/clipfrac_avg"] == 0 and m["policy/approxkl_avg"] < 1e-10
    # scores far from what the critic knows: their mean leaves the advantages before any minibatch squares them
    off, _ = masking.nlpo_experience(model, None, seen, draw(tiny.LLAMA, 2), rollout, scores + 3e4, 0.1, temperature=0.7, gamma=1.0, lam=1.0)
    assert abs(masked_mean(off.advantages, off.mask)) < 1e-2 and np.abs(off.advantages).max() < 3e2


def draw_head():
    return jax.tree.map(lambda s: 0.1 * jnp.ones(s.shape), heads.specs(16), is_leaf=nn.is_spec)
