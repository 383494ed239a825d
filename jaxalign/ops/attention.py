"""One `attend` for training, prefill and decoding, which picks its form by the platform of the mesh and by shape.

  a row attends to itself, causal         time is cut by the mesh      `ring`
  queries and keys of one length          on TPUs                      `splash`, where the shapes suit it
  a row attends to itself, causal         anywhere else                by blocks of queries
  a cache, a bias, another sequence                                    the plain form

A query sees a key when both lie in the same segment (0 = padding, seen by nobody; with branches, also in its trunk, see
`ops.branches`), the key's slot is not later than the query's, and, with a window, not further back than it. Letters: B batch, T queries, S keys, N query heads,
K key/value heads, G = N / K, H head width.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from jaxalign import shard
from jaxalign.ops import branches, ring, splash
from jaxalign.ops.masks import MASKED, visible
from jaxalign.ops.nn import wide

# Queries per block of the causal form, at least: each block reads only the keys before its end.
BLOCK = 64


def _plain(q, k, v, ok, scale, softcap, bias=None):
    """q [B,K,G,T,H], k and v [B,K,S,H], ok bool[B,T,S] -> [B,K,G,T,H]. Scores and softmax in f32."""
    s = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=wide(q)) * scale
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    s = jnp.where(ok[:, None, None], s, MASKED)
    p = jnp.exp(s - jax.lax.stop_gradient(s.max(-1, keepdims=True)))
    return (jnp.einsum("bkgts,bksh->bkgth", p.astype(v.dtype), v, preferred_element_type=wide(q)) / p.sum(-1, keepdims=True)).astype(v.dtype)


# -- causal self-attention by blocks of queries: half of the square is never computed, and no probabilities are kept ----


def _blocks(q_segments, window):
    """(first query, last + 1, visible bool[B,1,1,t,last + 1]) of each block."""
    T = q_segments.shape[1]
    size = max(BLOCK, -(-T // 32))
    for a in range(0, T, size):
        b = min(a + size, T)
        ok = visible(q_segments[:, a:b], q_segments[:, :b], jnp.arange(a, b), jnp.arange(b), causal=True, window=window)
        yield a, b, ok[:, None, None]


def _scores(q, k, softcap):
    s = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=wide(q))
    return s if softcap is None else softcap * jnp.tanh(s / softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal(softcap, q, k, v, segments, window):
    return _causal_fwd(softcap, q, k, v, segments, window)[0]


def _causal_fwd(softcap, q, k, v, segments, window):
    out, lse = [], []
    for a, b, ok in _blocks(segments, window):
        s = jnp.where(ok, _scores(q[..., a:b, :], k[:, :, :b], softcap), MASKED)
        top = s.max(-1, keepdims=True)
        p = jnp.exp(s - top)
        total = p.sum(-1, keepdims=True)
        out.append(jnp.einsum("bkgts,bksh->bkgth", p.astype(v.dtype), v[:, :, :b], preferred_element_type=wide(q)) / total)
        lse.append(top + jnp.log(total))
    out, lse = jnp.concatenate(out, -2).astype(v.dtype), jnp.concatenate(lse, -2)
    return out, (q, k, v, segments, window, out, lse)


def _causal_bwd(softcap, saved, g):
    """Probabilities are made again from the scores and lse (Dao et al. 2022, 2205.14135, section 3.1)."""
    q, k, v, segments, window, out, lse = saved
    inner = (g.astype(wide(q)) * out).sum(-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros(k.shape, wide(q)), jnp.zeros(v.shape, wide(q))
    for a, b, ok in _blocks(segments, window):
        rows, keys = (Ellipsis, slice(a, b), slice(None)), (slice(None), slice(None), slice(0, b))
        s = _scores(q[rows], k[keys], softcap)
        p = jnp.exp(jnp.where(ok, s, MASKED) - lse[rows])
        dp = jnp.einsum("bkgth,bksh->bkgts", g[rows], v[keys], preferred_element_type=wide(q))
        ds = p * (dp - inner[rows])
        ds = (ds if softcap is None else ds * (1 - jnp.square(s / softcap))).astype(q.dtype)
        dq.append(jnp.einsum("bkgts,bksh->bkgth", ds, k[keys]))
        dk = dk.at[keys].add(jnp.einsum("bkgts,bkgth->bksh", ds, q[rows], preferred_element_type=wide(q)))
        dv = dv.at[keys].add(jnp.einsum("bkgts,bkgth->bksh", p.astype(g.dtype), g[rows], preferred_element_type=wide(q)))
    return jnp.concatenate(dq, -2), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_causal.defvjp(_causal_fwd, _causal_bwd)


def attend(q, k, v, *, q_segments, kv_segments, start=0, causal=True, window=None, positions=None, scale=None, softcap=None, bias=None) -> jax.Array:
    """Softmax attention: q [B,T,N,H], k and v [B,S,K,H] -> [B,T,N,H].

    q_segments i32[B,T], kv_segments i32[B,S] (u32 with branches); `start` is the slot of the first query (the cache's length before it).
    `window`: how many keys a query sees, itself included (None: all); it may be traced, and needs `positions` (i32[B,T],
    i32[B,S]) where keys lie in a cache with holes. `softcap` c bounds scores by
    c tanh(s / c) (Gemma 2, 2408.00118, section 2). `bias` f[N,T,S] or [B,N,T,S] is added to scaled scores (T5).
    """
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    scale = H**-0.5 if scale is None else scale
    whole = T == S and bias is None and isinstance(start, int)  # rows of their own length, no cache
    plain = not branches.branched(q_segments)  # segments that are equal or not, as ring and kernel compare them
    fixed = window is None or isinstance(window, int)  # a window that a kernel can know
    if whole and plain and causal and ring.fits(T):
        return ring.attend(softcap, q * jnp.asarray(scale, q.dtype), *_enough(k, v, N), q_segments, window)
    if whole and plain and fixed and splash.fits(T, S, H):
        return splash.attend(q * jnp.asarray(scale, q.dtype), *_enough(k, v, N), q_segments, kv_segments, causal=causal, window=window, softcap=softcap)
    # Heads before time: every product below is then a plain batched matrix product.
    q = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3)
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    if bias is not None:
        bias = bias.reshape(-1, K, N // K, T, S)
    if causal and whole:
        out = _causal(softcap, q * jnp.asarray(scale, q.dtype), k, v, q_segments, window)
    else:
        ok = visible(q_segments, kv_segments, start + jnp.arange(T), jnp.arange(S), causal=causal, window=window, positions=positions)
        out = _plain(q, k, v, ok, scale, softcap, bias)
    return jnp.moveaxis(out, 3, 1).reshape(B, T, N, H)


def _enough(k, v, N: int):
    """Keys and values for every device that heads are cut over: where those are more than the key heads each is repeated."""
    K, ways = k.shape[2], shard.ways("heads")
    more = math.lcm(K, ways) // K
    return (jnp.repeat(k, more, 2), jnp.repeat(v, more, 2)) if N % (K * more) == 0 else (k, v)
