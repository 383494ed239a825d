"""Who sees whom, said once for every form of attention."""

from __future__ import annotations

import jax

from jaxalign.ops import branches

# Where masked scores go. Finite, so that a row that sees nothing gives a finite mean and finite gradients.
MASKED = -1e30


def visible(q_segments, kv_segments, q_slots, kv_slots, *, causal: bool, window=None, positions=None) -> jax.Array:
    """bool[B,T,S]. `positions`, of queries and of keys, measure the window where slots have holes between them."""
    ok = branches.same(q_segments, kv_segments)
    gap = (q_slots[:, None] - kv_slots[None, :])[None]
    if causal:
        ok &= gap >= 0
    if window is not None:
        ok &= (gap if positions is None else positions[0][:, :, None] - positions[1][:, None, :]) < window
    return ok
