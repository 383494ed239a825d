"""Chunked log-probs and cross entropy: against TRL's and transformers' numbers, against plain autodiff in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recordings
from jax.sharding import NamedSharding, PartitionSpec
from jaxalign import shard
from jaxalign.ops import logprob as lp
from jaxalign.ops.nn import Unembed

TRL = recordings.load("logprobs.npz", "logits", "index", "labels", "logps*", "entropy", "batch_*", "extreme_*")
SFT = recordings.load("sft.npz", "logits", "labels", "loss__mean", "grad__mean", "loss__num_items50", "loss__label_smoothing*")


def identity(V):
    """With D = V and the identity as unembedding, hidden states are logits."""
    return Unembed(jnp.eye(V))


# -- against other implementations ----------------------------------------------------------------------------------


def test_logps_and_entropy_of_trl():
    z = TRL
    logits, index = z["logits"], z["index"].astype(np.int32)
    run = jax.jit(lambda x, t, temperature: lp.logprob(x, identity(x.shape[-1]), t, jnp.ones(t.shape), temperature=temperature, chunk=4 * 37 * 2))
    out = run(logits, index, 1.0)
    np.testing.assert_allclose(out.logp, z["logps"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.entropy, z["entropy"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(logits, index, 0.7).logp, z["logps_temp0.7"], rtol=1e-5, atol=1e-5)


def test_extreme_logits():
    z = TRL
    out = jax.jit(lambda x, t: lp.logprob(x, identity(3), t, jnp.ones(t.shape)))(z["extreme_logits"], z["extreme_index"].astype(np.int32))
    # At logits of -10000 one ulp of float32 is 1e-3, in TRL as here.
    np.testing.assert_allclose(out.logp, z["extreme_logps"], atol=1e-4)
    np.testing.assert_allclose(out.entropy, z["extreme_entropy"], atol=1e-4)


def test_sequence_logps_of_trl():
    """labels are not shifted there: `before` and `targets` must do what their internal shift does."""
    z = TRL
    labels = z["labels"].astype(np.int32)

    @jax.jit
    def run(x):
        ones = jnp.ones(labels.shape, jnp.int32)
        mask = lp.targets((labels != -100).astype(jnp.float32), ones)
        return lp.logprob(lp.before(x, ones), identity(37), np.maximum(labels, 0), mask).logp.sum(1), mask.sum(1)

    total, n = run(z["logits"])
    np.testing.assert_allclose(total, z["batch_logps_sum"], rtol=1e-5)
    np.testing.assert_allclose(total / n, z["batch_logps_mean"], rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.2])
def test_cross_entropy_of_transformers(smoothing):
    z = SFT
    labels, ones = z["labels"].astype(np.int32), np.ones(z["labels"].shape, np.int32)

    def total(x):
        w = lp.targets((labels != -100).astype(jnp.float32), ones)
        return lp.linear_ce(lp.before(x, ones), identity(29), np.maximum(labels, 0), w, smoothing=smoothing, chunk=3 * 29 * 4).total, w.sum()

    (value, n), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(z["logits"])
    np.testing.assert_allclose(value / n, z[f"loss__label_smoothing{smoothing}" if smoothing else "loss__mean"], rtol=1e-5)
    if not smoothing:
        np.testing.assert_allclose(value / 50, z["loss__num_items50"], rtol=1e-5)
        np.testing.assert_allclose(grad / n, z["grad__mean"], atol=1e-6)


# -- against plain autodiff -----------------------------------------------------------------------------------------

B, T, D, V = 2, 11, 5, 17
RNG = np.random.default_rng(0)
X, W, BIAS = RNG.standard_normal((B, T, D)), RNG.standard_normal((V, D)), RNG.standard_normal(V)
TOKENS = RNG.integers(0, V, (B, T)).astype(np.int32)
MASK = (RNG.random((B, T)) < 0.7).astype(np.float32)
MASK[:, :4] = 0  # a prompt: whole chunks without a target
G = RNG.standard_normal((3, B, T))

CASES = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0, "bias": True, "temperature": 0.7},
    "scale": {"scale": 0.3, "temperature": 1.6},
}


def dense(x, w, b, temperature, scale=1.0, softcap=None):
    z = scale * (x @ w.T) + b
    z = z if softcap is None else softcap * jnp.tanh(z / softcap)
    return z / temperature


def unembed(w, b, bias=False, scale=1.0, softcap=None, temperature=None):
    return Unembed(w, b if bias else None, scale=scale, softcap=softcap)


def reference(f, *args):
    """Value and gradients in float64 by plain autodiff."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(f, argnums=range(len(args))))(*(jnp.asarray(a, jnp.float64) for a in args)))


def against(plain, ours):
    """`ours` (x, w, b) -> (3 x sum, the rest) in float32 beside `plain` in float64, with and without gradients; the rest."""
    value, grads = reference(plain, X, W, BIAS)
    args = [np.float32(a) for a in (X, W, BIAS)]
    (got, rest), got_grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2), has_aux=True))(*args)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    for a, b in zip(got_grads, grads):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    alone, _ = jax.jit(ours)(*args)  # without gradients another path is taken
    np.testing.assert_allclose(alone, value, rtol=1e-5)
    return args, rest


@pytest.mark.parametrize("case", CASES)
def test_all_three_cotangents_against_float64(case):
    options = CASES[case]
    temperature, bias = options.get("temperature", 1.0), options.get("bias", False)

    def plain(x, w, b, t):
        z = dense(x, w, b * bias, t, options.get("scale", 1.0), options.get("softcap"))
        log_p = jax.nn.log_softmax(z)
        parts = jnp.take_along_axis(log_p, TOKENS[..., None], -1)[..., 0], -(jnp.exp(log_p) * log_p).sum(-1), jax.nn.logsumexp(z, -1)
        return sum((g * MASK * v).sum() for g, v in zip(G, parts))

    def ours(chunk):
        def f(x, w, b, t):
            return sum((g.astype(np.float32) * v).sum() for g, v in zip(G, lp.logprob(x, unembed(w, b, **options), TOKENS, MASK, temperature=t, chunk=chunk)))

        return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3)))

    value, grads = reference(plain, X, W, BIAS, temperature)
    for chunk in (B * V * 3, None):  # 4 chunks of 3, of which the first is skipped; one chunk
        got, got_grads = ours(chunk)(*(np.float32(a) for a in (X, W, BIAS, temperature)))
        np.testing.assert_allclose(got, value, rtol=1e-5)
        for a, b in zip(got_grads, grads):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_token_loss_against_float64(case, entropy):
    """A clipped ratio against old log-probs, with and without an entropy bonus: what PPO asks of it."""
    options = CASES[case]
    temperature, bias, coef = options.get("temperature", 1.0), options.get("bias", False), 0.3 * entropy
    old, advantage = -2 + G[0], G[1]

    def each(logp, h, extra):
        ratio = jnp.exp(logp - extra[0])
        return jnp.maximum(-extra[1] * ratio, -extra[1] * jnp.clip(ratio, 0.8, 1.2)) - coef * h

    def plain(x, w, b):
        log_p = jax.nn.log_softmax(dense(x, w, b * bias, temperature, options.get("scale", 1.0), options.get("softcap")))
        logp, h = jnp.take_along_axis(log_p, TOKENS[..., None], -1)[..., 0], -(jnp.exp(log_p) * log_p).sum(-1)
        return 3.0 * (MASK * each(logp, h, (old, advantage))).sum()

    def ours(x, w, b):
        extra = (old.astype(np.float32), advantage.astype(np.float32))
        total, out = lp.token_loss(x, unembed(w, b, **options), TOKENS, MASK, extra, each, entropy=entropy, temperature=temperature, chunk=B * V * 3)
        return 3.0 * total, out

    args, out = against(plain, ours)
    for a, b in zip(out, lp.logprob(args[0], unembed(*args[1:], **options), TOKENS, MASK, temperature=temperature)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["plain", "bias", "softcap", "scale"])
def test_linear_ce_against_float64(case):
    options = {k: v for k, v in CASES[case].items() if k != "temperature"}
    bias, smoothing, z_loss = options.get("bias", False), 0.1, 0.01

    def parts(x, w, b):
        z = dense(x, w, b * bias, 1.0, options.get("scale", 1.0), options.get("softcap"))
        return z, jax.nn.log_softmax(z), jax.nn.logsumexp(z, -1)

    def plain(x, w, b):
        z, log_p, lse = parts(x, w, b)
        nll = -jnp.take_along_axis(log_p, TOKENS[..., None], -1)[..., 0]
        return 3.0 * (MASK * ((1 - smoothing) * nll - smoothing * log_p.mean(-1) + z_loss * lse**2)).sum()

    ours = lambda x, w, b: (lambda ce: (3.0 * ce.total, ce))(lp.linear_ce(x, unembed(w, b, **options), TOKENS, MASK, smoothing=smoothing, z_loss=z_loss, chunk=B * V * 3))
    args, ce = against(plain, ours)
    z = np.asarray(jax.jit(lambda *a: parts(*a)[0])(*args))
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    np.testing.assert_allclose(ce.nll, -(MASK * np.take_along_axis(log_p, TOKENS[..., None], -1)[..., 0]).sum(), rtol=1e-5)
    np.testing.assert_allclose(ce.entropy, -(MASK[..., None] * np.exp(log_p) * log_p).sum(), rtol=1e-5)
    np.testing.assert_allclose(ce.correct, (MASK * (z.argmax(-1) == TOKENS)).sum())


def test_works_under_x64():
    """With 64-bit mode on, stray Python floats become float64: carries and cotangents must keep their dtypes."""
    with jax.enable_x64(True):
        f = lambda x, w, t: lp.logprob(x, Unembed(w), TOKENS, MASK, temperature=t).logp.sum() + lp.linear_ce(x, Unembed(w), TOKENS, MASK).total
        value, grads = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*(np.float32(a) for a in (X, W, 1.0)))
    assert [g.dtype for g in grads] == [jnp.float32] * 3
    # at temperature 1 log-probs and cross entropy cancel
    np.testing.assert_allclose([value, *map(lambda g: np.abs(g).max(), grads[:2])], 0, atol=1e-4)


# -- memory and cost ------------------------------------------------------------------------------------------------


def sizes(jaxpr):
    """The number of elements of every array a program makes, inner programs included."""
    for eqn in jaxpr.eqns:
        yield from (int(np.prod(v.aval.shape)) for v in eqn.outvars if hasattr(v.aval, "shape"))
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from sizes(getattr(inner, "jaxpr", inner))


def test_the_whole_logits_are_never_held():
    b, t, d, v = 2, 64, 4, 128  # chunks of 4: logits 2*4*128 = 1024 elements, against 2*64*128 = 16384 for all
    x, w, tokens, mask = jnp.ones((b, t, d)), jnp.ones((v, d)), jnp.zeros((b, t), jnp.int32), jnp.ones((b, t))
    chunked = lambda x, w: sum(o.sum() for o in lp.logprob(x, Unembed(w), tokens, mask, chunk=b * v * 4))
    fused = lambda x, w: lp.linear_ce(x, Unembed(w), tokens, mask, chunk=b * v * 4).total
    summed = lambda x, w: lp.token_loss(x, Unembed(w), tokens, mask, (), lambda logp, h, _: jnp.exp(logp) + h, entropy=True, chunk=b * v * 4)[0]
    for f in (chunked, fused, summed):
        assert max(sizes(jax.make_jaxpr(jax.value_and_grad(f, argnums=(0, 1)))(x, w).jaxpr)) == b * v * 4
    plain = lambda x, w: jax.nn.log_softmax(x @ w.T).sum()
    assert max(sizes(jax.make_jaxpr(jax.grad(plain))(x, w).jaxpr)) == b * t * v  # the ruler measures


@pytest.mark.parametrize("f", ["logprob", "linear_ce", "token_loss"])
def test_chunks_without_targets_are_skipped(f):
    """NaN hidden states in a chunk that nobody asks for would spread to the weight's gradient (0 * NaN) if computed."""
    x = X.astype(np.float32).copy()
    x[:, :3] = np.nan  # chunks are 3 wide, and MASK[:, :4] is 0
    one = {
        "logprob": lambda x, w: sum(o.sum() for o in lp.logprob(x, Unembed(w), TOKENS, MASK, chunk=B * V * 3)),
        "linear_ce": lambda x, w: lp.linear_ce(x, Unembed(w), TOKENS, MASK, chunk=B * V * 3).total,
        "token_loss": lambda x, w: lp.token_loss(x, Unembed(w), TOKENS, MASK, (), lambda logp, h, _: logp, chunk=B * V * 3)[0],
    }[f]
    value, (dx, dw) = jax.jit(jax.value_and_grad(one, argnums=(0, 1)))(x, W.astype(np.float32))
    assert np.isfinite(value) and np.isfinite(dw).all() and not np.asarray(dx)[:, :3].any()


def test_skipped_chunks_cost_nothing(monkeypatch):
    """4 chunks, of which the first holds no target: 3 are computed, and once more in the backward of `logprob` alone."""
    real, runs = lp._logits, []
    monkeypatch.setattr(lp, "_logits", lambda *a: (jax.debug.callback(lambda: runs.append(1)), real(*a))[1])

    def count(f):
        runs.clear()
        jax.block_until_ready(jax.jit(f)(X.astype(np.float32)))
        jax.effects_barrier()
        return len(runs)

    some = lambda x: lp.logprob(x, Unembed(W.astype(np.float32)), TOKENS, MASK, chunk=B * V * 3).logp.sum()
    fused = lambda x: lp.linear_ce(x, Unembed(W.astype(np.float32)), TOKENS, MASK, chunk=B * V * 3).total
    summed = lambda x: lp.token_loss(x, Unembed(W.astype(np.float32)), TOKENS, MASK, (), lambda logp, h, _: logp, chunk=B * V * 3)[0]
    assert [count(f) for f in (some, jax.grad(some), fused, jax.grad(fused), summed, jax.grad(summed))] == [3, 6, 3, 3, 3, 3]


def test_garbage_under_the_mask_and_an_empty_mask():
    other, tokens = X.astype(np.float32).copy(), TOKENS.copy()
    other[MASK == 0] = 1e4
    tokens[MASK == 0] = V - 1
    run = jax.jit(lambda x, t, m: (lp.logprob(x, Unembed(W.astype(np.float32)), t, m), lp.linear_ce(x, Unembed(W.astype(np.float32)), t, m)))
    jax.tree.map(np.testing.assert_array_equal, run(X.astype(np.float32), TOKENS, MASK), run(other, tokens, MASK))
    assert not any(np.asarray(v).any() for v in jax.tree.leaves(run(other, tokens, 0 * MASK)))


def test_large_logits_under_the_mask_stay_there():
    """lse is not kept there, so that exp(logit - lse) of a logit above 88 would be infinite, and 0 x inf is NaN."""
    x = X.astype(np.float32) * np.where(MASK > 0, 1, 300)[..., None].astype(np.float32)
    one = lambda x, w: lp.logprob(x, Unembed(w), TOKENS, MASK, chunk=B * V * 3).logp.sum()
    for g in jax.jit(jax.grad(one, argnums=(0, 1)))(x, W.astype(np.float32)):
        assert np.isfinite(g).all()


def test_bfloat16_hidden_states_give_float32_results():
    x = jnp.asarray(X, jnp.bfloat16)
    out, grad = jax.jit(jax.value_and_grad(lambda x: lp.logprob(x, Unembed(W.astype(np.float32)), TOKENS, MASK).logp.sum()))(x)
    assert out.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
    want = jax.jit(lambda x: lp.logprob(x, Unembed(W.astype(np.float32)), TOKENS, MASK).logp.sum())(X.astype(np.float32))
    np.testing.assert_allclose(out, want, rtol=0.02)


# -- the only shift -------------------------------------------------------------------------------------------------


def test_before_and_targets_by_hand():
    segments = np.array([[0, 1, 1, 1, 2, 2, 0, 0]], np.int32)
    x = np.arange(8, dtype=np.float32)[None]
    np.testing.assert_array_equal(lp.before(x, segments), [[0, 0, 1, 2, 0, 4, 0, 0]])
    np.testing.assert_array_equal(lp.before(x[..., None], segments)[..., 0], [[0, 0, 1, 2, 0, 4, 0, 0]])
    np.testing.assert_array_equal(lp.targets(np.ones((1, 8), np.float32), segments), [[0, 0, 1, 1, 0, 1, 0, 0]])


@pytest.mark.parametrize("form", ["logprob", "token_loss", "linear_ce"])
def test_a_vocabulary_in_pieces_gives_the_value_and_the_gradients_of_a_whole_one(form):
    """Two devices to a vocabulary, two to its embedding dimension and the rows, against no mesh at all."""
    r = np.random.default_rng(3)
    B, T, D, V = 4, 6, 8, 22
    x, w, b = (r.normal(size=s).astype(np.float32) for s in ((B, T, D), (V, D), (V,)))
    tokens, mask = r.integers(0, V, (B, T)), (r.random((B, T)) < 0.7).astype(np.float32)
    g = r.normal(size=(3, B, T)).astype(np.float32)

    def f(x, w, b):
        u = Unembed(w, b, softcap=3.0)
        if form == "logprob":
            return sum((a * o).sum() for a, o in zip(g, lp.logprob(x, u, tokens, mask, temperature=0.7, chunk=B * V * 2)))
        if form == "token_loss":
            return lp.token_loss(x, u, tokens, mask, g[0], lambda logp, entropy, e: e * logp**2 - 0.3 * entropy, entropy=True, chunk=B * V * 2)[0]
        return lp.linear_ce(x, u, tokens, mask, smoothing=0.1, z_loss=0.01, chunk=B * V * 2).total

    want = jax.jit(jax.value_and_grad(f, (0, 1, 2)))(x, w, b)
    mesh = shard.make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, devices=jax.devices()[:4])
    at = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, PartitionSpec(*spec)))
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(f, (0, 1, 2)))(at(x, "fsdp"), at(w, "tensor", "fsdp"), at(b, "tensor"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, want)
