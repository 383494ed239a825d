"""The cache of keys and values, slot by slot."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxalign.ops import kvcache


def test_writes_in_order_and_grows():
    for scan in (False, True):
        cache = kvcache.init(2, 3, 4, 1, 2, jnp.float32, scan)
        cache, segments, start = kvcache.reserve(cache, np.ones((3, 2), np.int32))
        assert start == 0 and cache["length"] == 2
        np.testing.assert_array_equal(segments, [[1, 1, 0, 0]] * 3)
        layer = jax.tree.map(lambda x: x[0], cache["layers"]) if scan else cache["layers"][0]
        kv, k, v = kvcache.write(layer, jnp.ones((3, 2, 1, 2)), 2 * jnp.ones((3, 2, 1, 2)), start)
        np.testing.assert_array_equal(kv["v"][0, 0, :, 0], [2, 2, 0, 0])
        np.testing.assert_array_equal(v[0, :, 0, 0], [2, 2, 0, 0])
        np.testing.assert_array_equal(k[0, :, 0, 0], [1, 1, 0, 0])
        cache = kvcache.grow(cache, 7)
        shape = (2, 3, 1, 7, 2) if scan else (3, 1, 7, 2)
        assert {x.shape for x in jax.tree.leaves(cache["layers"])} == {shape}
        _, segments, start = kvcache.reserve(cache, 5 * np.ones((3, 1), np.int32))
        np.testing.assert_array_equal(segments, [[1, 1, 5, 0, 0, 0, 0]] * 3)
        assert start == 2


def test_rows_of_their_own_lengths_and_past_the_end():
    """Each row is written behind its own; what lies past the end is dropped, and moves nothing back over older slots."""
    cache = {**kvcache.init(1, 2, 3, 1, 1, jnp.float32, False), "length": jnp.array([0, 2])}
    cache, segments, start = kvcache.reserve(cache, np.ones((2, 2), np.int32))
    np.testing.assert_array_equal(segments, [[1, 1, 0], [0, 0, 1]])
    kv, k, _ = kvcache.write(cache["layers"][0], jnp.array([3.0, 4.0] * 2).reshape(2, 2, 1, 1), jnp.zeros((2, 2, 1, 1)), start)
    np.testing.assert_array_equal(k[:, :, 0, 0], [[3, 4, 0], [0, 0, 3]])
    np.testing.assert_array_equal(cache["length"], [2, 4])
    twice = kvcache.map_rows(lambda x, axis: jnp.repeat(x, 2, axis), cache)
    assert twice["segments"].shape == (4, 3) and twice["layers"][0]["k"].shape == (4, 1, 3, 1)
