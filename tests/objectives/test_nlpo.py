"""NLPO: which tokens are allowed, log-probs of what is left, and where it is PPO."""

import functools
import math

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxalign import shard
from jaxalign.models import decoder, heads
from jaxalign.objectives import nlpo, ppo
from jaxalign.ops import nn
from jaxalign.ops.allowed import Rule, allowed, masked_logprob
from jaxalign.train import step
from jaxalign.types import UserError


def by_loop(logits, rule):
    """RL4LMs: walk down the tokens; each is removed once the sum of those before it is above p."""
    order = sorted(range(len(logits)), key=lambda v: -logits[v])
    p = np.exp(np.float64(logits) - np.max(logits))
    p /= p.sum()
    out, total = np.zeros(len(logits), bool), 0.0
    for place, v in enumerate(order):
        out[v] = place < rule.top_mask if rule.mask_type in ("top_k", "learned_top_k") else total <= rule.top_mask or place < rule.min_tokens_to_keep
        total += p[v]
    out[list(rule.special)] = True
    return out


@pytest.mark.parametrize("rule", [Rule("learned_top_p", 0.9, 1), Rule("learned_top_p", 0.5, 4, (0, 3)), Rule("learned_top_p", 0.01, 1), Rule("learned_top_k", 5, 1, (2,)), Rule("learned_top_k", 99, 1), Rule("learned_top_p", 0.3, 99), Rule("top_p", 0.5, 2), Rule("top_k", 3, 1)])
def test_allowed_by_a_loop(rule):
    logits = np.random.default_rng(0).standard_normal((3, 40, 23)).astype(np.float32) * 3
    got = jax.jit(functools.partial(allowed, rule=rule))(logits)
    want = np.apply_along_axis(by_loop, -1, logits, rule)
    np.testing.assert_array_equal(got, want)
    assert want.any(-1).all()


def test_everything_is_allowed_at_one():
    """Also where rounding carries the sum past 1."""
    assert allowed(jnp.zeros((2, 50_000)), Rule("learned_top_p", 1.0, 1)).all()


@pytest.mark.parametrize("bad", [dict(mask_type="topk"), dict(top_mask=0.0), dict(top_mask=1.5), dict(mask_type="learned_top_k", top_mask=0.9), dict(mask_type="top_k", top_mask=0.9), dict(min_tokens_to_keep=0)])
def test_refused(bad):
    with pytest.raises(UserError, match="mask_type"):
        nlpo.nlpo(None, **bad)


def network(seed, V=19, D=6):
    r = np.random.default_rng(seed)
    n = lambda *s: r.standard_normal(s).astype(np.float32)
    return n(4, 9, D), nn.Unembed(n(V, D), n(V), scale=0.7)


RULE = Rule("learned_top_p", 0.6, 2, (5,))


def test_log_probs_of_what_is_left():
    """Against everything held at once, value and gradient; in chunks of one step and of all."""
    (x, u), (other, v) = network(1), network(2)
    r = np.random.default_rng(3)
    tokens, mask = r.integers(0, 19, (4, 9)), (r.random((4, 9)) < 0.7).astype(np.float32)
    g = r.standard_normal((2, 4, 9)).astype(np.float32)
    logits = lambda x, u: (x @ u.weight.T) * u.scale + u.bias

    def whole(x, u):
        ok = allowed(logits(other, v), RULE) | jax.nn.one_hot(tokens, 19, dtype=bool)
        logp = jax.nn.log_softmax(jnp.where(ok, logits(x, u) / 0.8, -jnp.inf))
        own = jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0]
        return (mask * (g[0] * own - g[1] * jnp.where(ok, jnp.exp(logp) * jnp.where(ok, logp, 0), 0).sum(-1))).sum(), (own, ok.sum(-1))

    (want, (own, count)), grads = jax.jit(jax.value_and_grad(whole, (0, 1), has_aux=True))(x, u)
    for chunk in (1, None):
        def ours(x, u):
            out, count = masked_logprob(x, u, other, v, tokens, mask, RULE, temperature=0.8, chunk=chunk)
            return (g[0] * out.logp + g[1] * out.entropy).sum(), (out.logp, count)

        (got, (logp, n)), back = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(x, u)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        np.testing.assert_allclose(logp, own * mask, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(n, count * mask)
        assert tiny.far(back, grads) < 1e-5
    assert not allowed(logits(other, v), RULE)[np.arange(4)[:, None], np.arange(9), tokens].all()  # some tokens only stand because they stand there


PARAMS = functools.partial(tiny.init, tiny.LLAMA, value=True)


def test_it_is_ppo_where_all_is_allowed():
    """PPO without a value clip, twice its value coefficient (it halves the square), on advantages of mean 0 and std 1."""
    batch = tiny.experience(np.random.default_rng(4), 8, 12)
    mask = np.asarray(batch.mask * (np.arange(12) > 0))
    a = batch.advantages[mask > 0]
    even = batch._replace(advantages=((batch.advantages - a.mean()) / (a.std() + 1e-8)).astype(np.float32))
    old = {"policy": jax.tree.map(lambda x: 0.5 * x, PARAMS()["policy"])}
    run = lambda o, b: jax.jit(lambda p: step.gradient(o, p, {}, old, b, jax.random.key(0)))(PARAMS())
    loss, m, grads = run(nlpo.nlpo(tiny.LLAMA, top_mask=1.0, entropy_coef=0.01, vf_coef=0.5, temperature=0.7), batch)
    want, m_, grads_ = run(ppo.ppo(tiny.LLAMA, value_clip=1e9, value_coef=1.0, entropy_coef=0.01, ratio_threshold=1e9, temperature=0.7), even)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert tiny.far(grads, grads_) < 1e-4 and m["val/allowed"] == tiny.V
    for k in ("policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "val/ratio"):
        np.testing.assert_allclose(m[k], m_[k], rtol=1e-4, atol=1e-6)


def test_split_alike_and_the_mask_counts():
    """In two pieces, on eight devices: the advantages' mean and std are those of the whole. The masking policy changes the loss."""
    batch, old = tiny.experience(np.random.default_rng(5), 8, 12), {"policy": tiny.init(tiny.LLAMA, seed=1)}
    o = nlpo.nlpo(tiny.LLAMA, top_mask=0.5, min_tokens_to_keep=2, special=(0, 3))
    run = jax.jit(lambda p, old, n: step.gradient(o, p, {}, old, batch, jax.random.key(0), n), static_argnums=2)
    loss, m, grads = run(PARAMS(), old, 1)
    mesh = shard.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        specs = {"policy": tiny.LLAMA.specs(), "value": heads.specs(16)}
        got = jax.device_get(run(jax.device_put(PARAMS(), shard.shardings(specs, mesh)), jax.device_put(old, shard.shardings({"policy": specs["policy"]}, mesh)), 2))
    np.testing.assert_allclose(got[0], loss, rtol=1e-5)
    assert tiny.far(got[2], grads) < 1e-4 and 2 <= m["val/allowed"] < tiny.V
    assert run(PARAMS(), {"policy": PARAMS()["policy"]}, 1)[0] != loss


def test_copied_every_so_many_rollouts():
    o = nlpo.nlpo(tiny.LLAMA, target_update_iterations=3, updates=4)
    due = [s for s in range(30) if o.update_aux({"policy": jnp.zeros(())}, {"policy": jnp.ones(()), "value": 0}, {}, s)["policy"] == 1]
    assert due == [11, 23]
    for kind, k in (("top_p", 0.9), ("top_k", 5)):
        assert nlpo.nlpo(tiny.LLAMA, mask_type=kind, top_mask=k).update_aux is None


def test_no_program_holds_the_logits_of_a_batch():
    B, T, size = 4, 256, 2**15
    model = decoder.model(vocab=size, dim=8, layers=1, heads=2, hidden=8)
    shape = lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32)
    params = jax.tree.map(shape, {"policy": model.specs(), "value": heads.specs(8)}, is_leaf=nn.is_spec)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny.experience(np.random.default_rng(0), B, T))
    run = lambda p, a, b: step.gradient(nlpo.nlpo(model, entropy_coef=0.1), p, {}, a, b, jax.random.key(0))
    program = jax.jit(run).lower(params, {"policy": params["policy"]}, batch).compile().as_text()
    assert not [s for s in hlo.shapes(program) if math.prod(s) >= B * T * size]
