"""`attend` against the definition, one query at a time in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxalign.ops import attention


def naive(q, k, v, q_seg, kv_seg, start=0, causal=True, window=None, scale=None, softcap=None):
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(B, T, N):
        sees = [s for s in range(S) if q_seg[b, t] and q_seg[b, t] == kv_seg[b, s] and (not causal or s <= start + t) and (window is None or start + t - s < window)]
        if sees:
            z = k[b, sees, n // (N // K)] @ q[b, t, n] * (H**-0.5 if scale is None else scale)
            z = z if softcap is None else softcap * np.tanh(z / softcap)
            p = np.exp(z - z.max())
            out[b, t, n] = p / p.sum() @ v[b, sees, n // (N // K)]
    return out


def draw(T, S, N=4, K=2, H=3, B=2, seed=0):
    r = np.random.default_rng(seed)
    return tuple(r.standard_normal(s).astype(np.float32) for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1, 1]], np.int32)


OPTIONS = [{"causal": False}, {"window": 2}, {"softcap": 1.5}, {"scale": 0.1}, {"causal": False, "window": 1}]


@pytest.mark.parametrize("options, K", [({}, 1), ({}, 2), ({}, 4), *((o, 2) for o in OPTIONS)])
def test_against_the_definition(options, K):
    q, k, v = draw(7, 7, K=K)
    got = jax.jit(lambda *a: attention.attend(*a, q_segments=SEGMENTS, kv_segments=SEGMENTS, **options))(q, k, v)
    want = naive(q, k, v, SEGMENTS, SEGMENTS, **options)
    np.testing.assert_allclose(np.where(SEGMENTS[..., None, None], got, 0), want, atol=1e-5)
    assert np.isfinite(got).all()  # a query on padding sees nobody, and is finite all the same


@pytest.mark.parametrize("traced", [False, True])
def test_start_of_the_cache(traced):
    q, k, v = draw(2, 7)
    run = jax.jit(lambda start, *a: attention.attend(*a, q_segments=SEGMENTS[:, 3:5], kv_segments=SEGMENTS, start=start), static_argnums=() if traced else 0)
    np.testing.assert_allclose(run(3, q, k, v), naive(q, k, v, SEGMENTS[:, 3:5], SEGMENTS, start=3), atol=1e-5)


@pytest.mark.parametrize("window, softcap", [(None, None), (50, None), (None, 1.5), (20, 0.7)])
@pytest.mark.parametrize("T", [1, 64, 150])  # one key; one block; two blocks and a rest
def test_blocked_form_equals_the_plain_one(T, window, softcap):
    """Value and gradient of the blocks with their own VJP against autodiff through the whole square, which a traced `start` selects."""
    q, k, v = draw(T, T, B=1, N=2, K=1)
    segments = np.repeat([1, 2, 0], [T - T // 2 - T // 16, T // 2, T // 16])[None].astype(np.int32)
    weights = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32) * (segments != 0)[..., None, None]

    def f(start, q, k, v):
        out = attention.attend(q, k, v, q_segments=segments, kv_segments=segments, window=window, softcap=softcap, start=start)
        return (out * weights).sum(), out

    (_, out), grads = jax.jit(lambda *a: jax.value_and_grad(f, argnums=(1, 2, 3), has_aux=True)(0, *a))(q, k, v)
    (_, plain), plain_grads = jax.jit(jax.value_and_grad(f, argnums=(1, 2, 3), has_aux=True))(0, q, k, v)
    valid = segments[0] != 0
    np.testing.assert_allclose(out[:, valid], plain[:, valid], atol=1e-5)
    np.testing.assert_allclose(out[:, valid], naive(q, k, v, segments, segments, window=window, softcap=softcap)[:, valid], atol=1e-5)
    for a, b in zip(grads, plain_grads):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert all(np.isfinite(g).all() for g in grads)


def test_a_window_counts_tokens_where_the_cache_has_holes():
    q, k, v = draw(1, 5)
    segments, positions = np.array([[1, 1, 0, 0, 1]] * 2, np.int32), np.array([[0, 1, 0, 0, 2]] * 2, np.int32)
    run = lambda window, at: jax.jit(lambda *a: attention.attend(*a, q_segments=segments[:, 4:], kv_segments=segments, start=4, window=window, positions=at))(q, k, v)
    at = positions[:, 4:], positions
    np.testing.assert_allclose(run(3, at), run(None, None), atol=1e-6)  # three tokens: all of them
    np.testing.assert_allclose(run(jnp.int32(3), at), run(None, None), atol=1e-6)
    assert abs(run(2, at) - run(3, at)).max() > 1e-3 and abs(run(3, None) - run(3, at)).max() > 1e-3


def test_a_bias_is_added_to_scaled_scores():
    q, k, v = draw(7, 7, K=2)
    bias = np.random.default_rng(1).standard_normal((q.shape[2], 7, 7)).astype(np.float32)
    got = jax.jit(lambda *a: attention.attend(*a, q_segments=SEGMENTS, kv_segments=SEGMENTS, causal=False, bias=bias))(q, k, v)
    scores = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, q.shape[2] // 2, 2)) * q.shape[-1] ** -0.5 + bias
    p = np.exp(np.where((SEGMENTS[:, :, None] == SEGMENTS[:, None])[:, None], scores, -1e30))
    want = np.einsum("bnts,bsnh->btnh", p / np.maximum(p.sum(-1, keepdims=True), 1e-30), np.repeat(v, q.shape[2] // 2, 2))
    np.testing.assert_allclose(np.where(SEGMENTS[..., None, None], got - want, 0), 0, atol=1e-5)


def test_blocked_form_keeps_no_square_for_the_backward_pass():
    q, k, v = draw(256, 256, B=1, N=2, K=1)
    segments = np.ones((1, 256), np.int32)
    residuals = jax.eval_shape(lambda *a: jax.vjp(lambda *a: attention.attend(*a, q_segments=segments, kv_segments=segments), *a)[1], q, k, v)
    assert max(np.prod(x.shape) for x in jax.tree.leaves(residuals)) <= q.size


def test_bfloat16_scores_are_float32():
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in draw(7, 7))
    got = jax.jit(lambda *a: attention.attend(*a, q_segments=SEGMENTS, kv_segments=SEGMENTS))(q, k, v)
    want = naive(*(np.asarray(a, np.float32) for a in (q, k, v)), SEGMENTS, SEGMENTS)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.where(SEGMENTS[..., None, None], np.asarray(got, np.float32), 0), want, atol=0.03)
