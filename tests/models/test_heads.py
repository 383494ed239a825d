"""Q and V heads of ILQL against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxalign.models import heads
from jaxalign.ops import nn


def test_q_and_v_heads_against_a_loop():
    params = jax.jit(lambda k: nn.init(heads.q_and_v_specs(6, 9, twins=3), k))(jax.random.key(0))
    params = jax.tree.map(lambda x: np.asarray(x) + 0.1, params)  # biases are drawn as 0
    x = np.random.default_rng(0).standard_normal((2, 4, 6)).astype(np.float32)

    def mlp(p, row):
        h = [max(sum(row[i] * p["up"]["w"][i, j] for i in range(6)) + p["up"]["b"][j], 0.0) for j in range(12)]
        return [sum(h[j] * p["down"]["w"][j, o] for j in range(12)) + p["down"]["b"][o] for o in range(p["down"]["b"].shape[0])]

    q, v = heads.q_values(params["q"], x), heads.v_values(params["v"], x)
    assert q.shape == (3, 2, 4, 9) and v.shape == (2, 4)
    for b, t in np.ndindex(2, 4):
        for i in range(3):
            np.testing.assert_allclose(q[i, b, t], mlp(params["q"][str(i)], x[b, t]), rtol=1e-4)
        np.testing.assert_allclose(v[b, t], mlp(params["v"], x[b, t])[0], rtol=1e-4)
    assert len({np.asarray(p["up"]["w"]).tobytes() for p in params["q"].values()}) == 3  # twins that start alike stay alike


def test_where_heads_begin():
    """Reward heads at std 1 / sqrt(D + 1), critics at 0: the first advantages are then the rewards themselves (lm-human-preferences)."""
    reward, critic = (nn.init(heads.specs(4095, zero), jax.random.key(0)) for zero in (False, True))
    np.testing.assert_allclose(np.asarray(reward["weight"]).std(), 1 / 64, rtol=0.05)
    assert not reward["bias"] and not np.asarray(critic["weight"]).any() and not critic["bias"]


def test_a_value_head_with_a_hidden_layer():
    """trlX's Linear, ReLU, Linear, by hand; and its gradient reaches every leaf."""
    params = nn.init(heads.mlp_specs(5), jax.random.key(0))
    params["up"]["b"], params["down"]["b"] = jnp.linspace(-0.5, 0.5, 10), jnp.array([0.3])
    x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    hidden = np.maximum(x @ np.asarray(params["up"]["w"]) + np.asarray(params["up"]["b"]), 0)
    np.testing.assert_allclose(nn.scalar(params, x), (hidden @ np.asarray(params["down"]["w"]))[..., 0] + 0.3, rtol=1e-5, atol=1e-6)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(jax.grad(lambda p: (nn.scalar(p, x) ** 2).sum())(params)))
