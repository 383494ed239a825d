"""Specs, norms, rope, layer stack: against numpy and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxalign.ops import nn, rope
from jaxalign.ops.nn import Spec


def test_init_depends_on_names_only():
    a = {"x": Spec((4, 3), (None, None), nn.normal(2.0)), "y": {"z": Spec((5,), (None,), nn.normal(1.0))}}
    b = {"a": Spec((2,), (None,), nn.ones), **a}
    run = lambda specs: jax.jit(lambda k: nn.init(specs, k))(jax.random.key(0))
    one, two = run(a), run(b)
    np.testing.assert_array_equal(one["x"], two["x"])
    np.testing.assert_array_equal(one["y"]["z"], two["y"]["z"])
    big = jax.jit(lambda k: nn.init({"x": Spec((100, 50), (None, None), nn.normal(2.0))}, k, "bfloat16"))(jax.random.key(1))["x"]
    assert big.dtype == jnp.bfloat16 and abs(float(big.astype(np.float32).std()) - 2) < 0.1
    assert nn.count(nn.stacked(a, 3)) == 3 * (12 + 5)


def test_fold_takes_names_and_traced_numbers():
    k = jax.random.key(0)
    data = lambda *w: tuple(np.asarray(jax.random.key_data(nn.fold(k, *w))))
    assert len({data(), data("a"), data("b"), data("a", 1), data("a", 2), data(1, "a")}) == 6
    traced = jax.jit(lambda i: jax.random.key_data(nn.fold(k, "a", i)))(2)
    assert tuple(np.asarray(traced)) == data("a", 2)


def test_norms():
    r = np.random.default_rng(0)
    x, s, b = (r.standard_normal(n).astype(np.float32) for n in ((2, 3, 8), 8, 8))
    rms, layer = jax.jit(lambda: (nn.rms_norm(x, s, 1e-5), nn.layer_norm(x, s, b, 1e-5)))()
    np.testing.assert_allclose(rms, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * s, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer, (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * s + b, rtol=1e-4, atol=1e-5)


def test_rope_is_multiplication_by_a_unit_complex_number():
    r = np.random.default_rng(0)
    x = r.standard_normal((2, 5, 3, 8)).astype(np.float32)
    positions = r.integers(0, 1000, (2, 5)).astype(np.int32)
    got = jax.jit(lambda x, p: rope.rotate(x, rope.table(p, 8, 100.0)))(x, positions)
    z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[..., None, None] * 100.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(got, np.concatenate([z.real, z.imag], -1), atol=2e-4)


def test_embed_and_linear():
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(nn.embed(table, np.array([[2, 0]]), "float32"), [[[4, 5], [0, 1]]])
    out = jax.jit(nn.linear)(jnp.ones((2, 4, 3), jnp.bfloat16), np.ones((3, 5), np.float32), np.ones(5, np.float32))
    assert out.dtype == jnp.bfloat16 and out.shape == (2, 4, 5) and (out == 4).all()


def test_stack_scans_and_unrolls_alike():
    params = {"w": np.random.default_rng(0).standard_normal((3, 4, 4)).astype(np.float32)}
    cache = np.arange(3, dtype=np.float32)
    block = lambda p, x, c, e: (jnp.tanh(x @ p["w"] + e), None if c is None else c + x.sum())
    each = np.array([0.1, -0.3, 0.5], np.float32)
    x = np.ones((2, 4), np.float32)
    unrolled = jax.jit(lambda: nn.stack(block, params, x, tuple(cache), 3, scan=False, each=each))()
    scanned = jax.jit(lambda: nn.stack(block, params, x, cache, 3, scan=True, each=each))()
    np.testing.assert_allclose(scanned[0], unrolled[0], rtol=1e-6)
    np.testing.assert_allclose(scanned[1], np.stack(unrolled[1]), rtol=1e-6)
    assert nn.stack(block, params, x, None, 3, scan=False, each=each)[1] is None
