"""One `attend` for training, prefill and decoding.

A query sees a key when both lie in the same segment (0 = padding, seen by nobody), the key's slot is not later than
the query's, and, with a window, not further back than it. Letters: B batch, T queries, S keys, N query heads,
K key/value heads, G = N / K, H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Where masked scores go. Finite, so that a row that sees nothing gives a finite mean and finite gradients.
MASKED = -1e30
# Queries per block of the causal form: each block reads only the keys before its end. Found best on CPU (64 of 256).
BLOCK = 64


def visible(q_segments, kv_segments, q_slots, kv_slots, *, causal: bool, window: int | None) -> jax.Array:
    """bool[B,T,S]."""
    ok = (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments[:, :, None] != 0)
    gap = q_slots[:, None] - kv_slots[None, :]
    if causal:
        ok &= (gap >= 0)[None]
    if window is not None:
        ok &= (gap < window)[None]
    return ok


def _plain(q, k, v, ok, scale, softcap):
    """q [B,T,K,G,H], k and v [B,S,K,H], ok bool[B,T,S] -> [B,T,K,G,H]. Scores and softmax in f32."""
    s = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    s = jnp.where(ok[:, None, None], s, MASKED)
    p = jnp.exp(s - jax.lax.stop_gradient(s.max(-1, keepdims=True)))
    p = (p / p.sum(-1, keepdims=True)).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", p, v)


def attend(q, k, v, *, q_segments, kv_segments, start=0, causal=True, window=None, scale=None, softcap=None) -> jax.Array:
    """Softmax attention: q [B,T,N,H], k and v [B,S,K,H] -> [B,T,N,H].

    q_segments i32[B,T], kv_segments i32[B,S]; `start` is the slot of the first query (the cache's length before it).
    """
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    scale = H**-0.5 if scale is None else scale
    q = q.reshape(B, T, K, N // K, H)
    kv_slots = jnp.arange(S)

    def part(a, b, keys):
        ok = visible(q_segments[:, a:b], kv_segments[:, :keys], start + jnp.arange(a, b), kv_slots[:keys], causal=causal, window=window)
        return _plain(q[:, a:b], k[:, :keys], v[:, :keys], ok, scale, softcap)

    if causal and T == S and T > BLOCK and isinstance(start, int) and T % BLOCK == 0 and T // BLOCK <= 32:
        # Half of the square is never looked at: cut the queries into blocks that read only what comes before.
        out = jnp.concatenate([part(a, a + BLOCK, a + BLOCK) for a in range(0, T, BLOCK)], axis=1)
    else:
        out = part(0, T, S)
    return out.reshape(B, T, N, H)
