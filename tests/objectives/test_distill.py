"""Distillation: torch's kl_div formulas in numpy, gradients by autodiff of whole logits, chunks, vocabularies that differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxalign.objectives import distill
from jaxalign.models import decoder
from jaxalign.ops import divergence as ops
from jaxalign.ops.nn import Unembed
from jaxalign.types import UserError

TEACHER = decoder.model(vocab=tiny.V, dim=8, layers=2, heads=2, hidden=16)


def plain(beta, p, q):
    """TRL's generalized_jsd_loss, token by token: torch's kl_div(input, target) is sum exp(target) (target - input)."""
    kl = lambda a, b: (np.exp(a) * (a - b)).sum(-1)
    if beta in (0, 1):
        return kl(p, q) if beta == 0 else kl(q, p)
    m = np.logaddexp(q + np.log1p(-beta), p + np.log(beta))
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def whole(x, u, tx, tu, tokens, mask, equation, alpha, tau):
    """The same loss through [B,T,V] logits and autodiff."""
    z, tz = x @ u.T, tx @ tu.T
    p, q = (jax.nn.log_softmax(v / tau) for v in (tz, z))
    nll = -jnp.take_along_axis(jax.nn.log_softmax(z), tokens[..., None], -1)[..., 0]
    return (mask * (alpha * equation(p, q).sum(-1) + (1 - alpha) * nll)).sum()


@pytest.mark.parametrize("alpha, tau", [(1.0, 1.0), (0.3, 2.0)])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_value_and_gradient_without_logits(beta, alpha, tau):
    r = np.random.default_rng(0)
    B, T, V, D, E = 3, 7, 11, 5, 4
    x, u, tx, tu = (jnp.asarray(r.standard_normal(s), jnp.float32) for s in ((B, T, D), (V, D), (B, T, E), (V, E)))
    tokens, mask = r.integers(0, V, (B, T)), (r.random((B, T)) < 0.6).astype(np.float32)
    mask[:, 2:4] = 0  # a chunk in which nothing is asked for
    f = ops.between(beta)
    ours = lambda x, u, chunk: ops.divergence(x, Unembed(u), tx, Unembed(tu), tokens, mask, f, alpha=alpha, tau=tau, chunk=chunk).total
    want, grads = jax.value_and_grad(whole, (0, 1))(x, u, tx, tu, tokens, mask, f, alpha, tau)
    for chunk in (None, 2 * B * 2 * V):
        got, g = jax.jit(jax.value_and_grad(ours, (0, 1)), static_argnums=2)(x, u, chunk)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        for a, b in zip(g, grads):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    d = ops.divergence(x, Unembed(u), tx, Unembed(tu), tokens, mask, f, tau=tau)
    p, q = (np.asarray(jax.nn.log_softmax(v / tau), np.float64) for v in (tx @ tu.T, x @ u.T))
    np.testing.assert_allclose(d.divergence, (mask * plain(beta, p, q)).sum(), rtol=1e-5)
    np.testing.assert_allclose(d.total, d.divergence, rtol=1e-6)
    alike = ops.divergence(tx, Unembed(tu), tx, Unembed(tu), tokens, mask, f, tau=tau)
    assert abs(alike.divergence) < 1e-5 and alike.nll == pytest.approx(float(d.teacher_nll), rel=1e-6)


def test_garbage_under_the_mask():
    r = np.random.default_rng(1)
    x, u = jnp.asarray(r.standard_normal((1, 4, 3)), jnp.float32), Unembed(jnp.asarray(r.standard_normal((5, 3)), jnp.float32))
    mask = np.array([[0, 1, 1, 0]], np.float32)
    wild = x.at[:, 0].set(jnp.inf).at[:, 3].set(jnp.nan)
    run = lambda tx: jax.value_and_grad(lambda x: ops.divergence(x, u, tx, u, np.zeros((1, 4), int), mask, ops.forward_kl).total)(x)
    for a, b in zip(run(2 * x), run(2 * wild)):
        np.testing.assert_array_equal(a, b)


def run(objective, params, batch, accumulate=1):
    from jaxalign.train import step

    frozen = {"teacher": tiny.init(TEACHER, 1)}
    return jax.jit(lambda p, b: step.gradient(objective, p, frozen, (), b, jax.random.key(0), accumulate))(params, batch)


def test_mixture_and_hintons_factor():
    """alpha tau^2 D + (1 - alpha) nll, of metrics that the step reports apart."""
    batch = tiny.rows(np.random.default_rng(3), 8, 12)
    loss, m, _ = run(distill.distill(tiny.LLAMA, TEACHER, alpha=0.7, tau=3.0), tiny.init(tiny.LLAMA), batch)
    np.testing.assert_allclose(loss, 0.7 * 9 * m["divergence"] + 0.3 * m["nll"], rtol=1e-5)
    loss, m, _ = run(distill.on_policy_distill(tiny.LLAMA, TEACHER, tau=3.0), {"policy": tiny.init(tiny.LLAMA)}, batch)
    np.testing.assert_allclose(loss, m["divergence"], rtol=1e-6)


def test_what_can_not_be_compared_is_refused():
    other = decoder.model(vocab=tiny.V + 1, dim=8, layers=1, heads=2, hidden=16)
    with pytest.raises(UserError, match="17 ids and the student's 16"):
        distill.distill(tiny.LLAMA, other)
    for bad in (dict(beta=1.5), dict(alpha=-0.1), dict(tau=0.0)):
        with pytest.raises(UserError):
            distill.distill(tiny.LLAMA, TEACHER, **bad)
    with pytest.raises(UserError, match="frozen"):
        tiny.gradient(distill.distill(tiny.LLAMA))(tiny.init(tiny.LLAMA), tiny.rows(np.random.default_rng(0), 4, 8))
