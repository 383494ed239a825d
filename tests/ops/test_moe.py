"""Experts against a loop over tokens; parity with transformers is in models/test_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxalign.models import decoder
from jaxalign.objectives import lm
from jaxalign.ops import moe, nn
from jaxalign.train import step
from jaxalign.types import Tokens, UserError

N, D, E, F = 17, 6, 5, 4


def draw(seed=0):
    r = np.random.default_rng(seed)
    x = r.standard_normal((N, D)).astype(np.float32)
    params = {k: r.standard_normal(s).astype(np.float32) for k, s in (("gate", (E, D, F)), ("up", (E, D, F)), ("down", (E, F, D)))}
    return x, r.standard_normal((D, E)).astype(np.float32), params


def loop(x, router, params, k, renormalise):
    out = np.zeros_like(x)
    for i, row in enumerate(x.astype(np.float64)):
        p = np.exp(row @ router)
        p /= p.sum()
        chosen = np.argsort(-p)[:k]
        weight = p[chosen] / (p[chosen].sum() if renormalise else 1)
        for w, e in zip(weight, chosen):
            gate = row @ params["gate"][e]
            out[i] += w * ((gate / (1 + np.exp(-gate)) * (row @ params["up"][e])) @ params["down"][e])
    return out


@pytest.mark.parametrize("k, renormalise", [(1, False), (2, True), (2, False), (E, True)])
def test_against_a_loop_over_tokens(k, renormalise):
    x, router, params = draw()

    def f(x, router, params):
        weight, expert, _ = moe.route(x, router, k, renormalise)
        return moe.experts(x, weight, expert, params, jax.nn.silu)

    np.testing.assert_allclose(jax.jit(f)(x, router, params), loop(x, router, params, k, renormalise), atol=1e-4)
    # Gradients against finite differences of the loop, in random directions; the choice of experts stays.
    r, eps = np.random.default_rng(1), 1e-3
    w = r.standard_normal((N, D)).astype(np.float32)
    grads = jax.jit(jax.grad(lambda *a: (f(*a) * w).sum(), argnums=(0, 1, 2)))(x, router, params)
    for i, (value, grad) in enumerate(zip((x, router, params["gate"], params["down"]), (grads[0], grads[1], grads[2]["gate"], grads[2]["down"]))):
        d = r.standard_normal(value.shape)
        at = lambda s: [x, router, params["gate"], params["down"]][:i] + [value + s * eps * d] + [x, router, params["gate"], params["down"]][i + 1 :]
        run = lambda s: (lambda v: (loop(v[0], v[1], {**params, "gate": v[2], "down": v[3]}, k, renormalise) * w).sum())([np.asarray(a, np.float64) for a in at(s)])
        np.testing.assert_allclose((grad * d).sum(), (run(1) - run(-1)) / (2 * eps), rtol=2e-2, atol=2e-2)


def test_no_token_is_dropped_when_all_choose_one_expert():
    x, router, params = draw()
    router = np.zeros_like(router)
    x[:, 0], router[0, 3] = np.abs(x[:, 0]) + 1, 50.0
    weight, expert, _ = moe.route(x, router, 1, False)
    assert (expert == 3).all()
    np.testing.assert_allclose(moe.experts(x, weight, expert, params, jax.nn.silu), loop(x, router, params, 1, False), atol=1e-4)


def test_an_even_load_costs_k_per_token():
    uniform = jnp.full((E * 4, E), 1 / E)
    expert = jnp.stack([jnp.arange(E * 4) % E, (jnp.arange(E * 4) + 1) % E], 1)  # each expert as often
    load = moe.load(uniform, expert, jnp.ones(E * 4))
    np.testing.assert_allclose(moe.balance(load) / load.tokens, 2, rtol=1e-6)
    one = moe.load(jax.nn.one_hot(jnp.zeros(8, int), E), jnp.zeros((8, 1), int), jnp.ones(8))
    np.testing.assert_allclose(moe.balance(one) / one.tokens, E)  # all on one: the worst


def test_padding_is_routed_and_not_counted():
    p = jax.nn.softmax(jnp.asarray(np.random.default_rng(0).standard_normal((6, E))))
    expert = jax.lax.top_k(p, 2)[1]
    some = moe.load(p, expert, jnp.array([1, 1, 0, 1, 0, 1.0]))
    kept = np.array([0, 1, 3, 5])
    want = moe.load(p[kept], expert[kept], jnp.ones(4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), some, want)


def test_the_balancing_loss_accumulates_exactly():
    """A product of two means: without the share of the whole step, four micro-batches would give another gradient."""
    model = decoder.model(vocab=23, dim=8, layers=2, heads=2, hidden=6, experts=4, experts_per_token=2, router_aux=0.5, arch="mixtral")
    params = jax.tree.map(lambda x: 5 * x, jax.jit(lambda k: nn.init(model.specs(), k))(jax.random.key(0)))
    r = np.random.default_rng(0)
    real = np.arange(12) < r.integers(4, 13, (8, 1))
    batch = Tokens(r.integers(1, 23, (8, 12)).astype(np.int32), real.astype(np.float32), real.astype(np.int32), np.tile(np.arange(12, dtype=np.int32), (8, 1)))
    run = lambda n: jax.jit(lambda p: step.gradient(lm.lm(model), p, {}, (), batch, jax.random.key(0), n))(params)
    (loss, metrics, whole), (again, _, parts) = run(1), run(4)
    assert metrics["loss/router"] > 0.5 * metrics["aux_loss"] * 0.99
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), parts, whole)
    assert abs(whole["layers"]["router"]).max() > 1e-4


def test_impossible_numbers_of_experts_are_refused():
    for k in (0, 5):
        with pytest.raises(UserError, match="experts_per_token"):
            decoder.model(vocab=9, dim=8, layers=1, heads=2, hidden=6, experts=4, experts_per_token=k)
