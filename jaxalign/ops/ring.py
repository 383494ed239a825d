"""Ring attention (Liu et al. 2023, 2310.01889): time is cut over the devices of the `context` axis, and keys and values go
round while queries stay, so no device ever holds a row's keys or a square of its scores.

Causal attention would leave the devices of early slices idle for half of the steps. So time is dealt out first: of 2C halves
device d takes the d-th and the d-th from the end, and every step is the same two products of halves on every device
(as in Brandon et al. 2023, 2311.09431, and Llama 3, 2407.21783, section 3.3.2). With a window, halves out of its reach are
masked, not skipped. B batch, T time, N query heads, K key/value heads, G = N / K, H head width, C devices.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxalign import shard
from jaxalign.ops.masks import MASKED, visible
from jaxalign.ops.nn import wide

HEADS, ROWS = "batch time heads .", "batch time"
# Queries whose scores are held at once.
BLOCK = 512


def fits(T: int) -> bool:
    """Two halves of a slice for every device."""
    return shard.ways("time") > 1 and T % (2 * shard.ways("time")) == 0


def _deal(pieces, x, back: bool = False):
    """Of x [B,t,...], the t-th slice of time, the halves that this device takes: [2,B,t/2,...], the earlier first; and back."""
    C = pieces.ways("time")
    home = [[(i, min(c, 2 * C - 1 - c)) for i, c in enumerate(range(n, 2 * C, 2))] for n in (0, 1)]  # of even and of odd halves
    even = pieces.index("time") % 2 == 0
    swap = lambda a, b: (jnp.where(even, a, b), jnp.where(even, b, a))
    if back:
        return jnp.concatenate([pieces.turn(a, "time", [(j, i) for i, j in way]) for a, way in zip(swap(*x), home)], 1)
    return jnp.stack(swap(*(pieces.turn(a, "time", way) for a, way in zip(jnp.split(x, 2, axis=1), home))))


def _slots(pieces, h: int):
    """i32[2,h]: where in the row the halves lie."""
    C, d = pieces.ways("time"), pieces.index("time")
    return jnp.stack([d, 2 * C - 1 - d])[:, None] * h + jnp.arange(h)


def _round(pieces, visit, carry, travelling):
    """`visit(carry, travelling, i, j)`, queries of half i with keys of half j, for all that can see one another. What travels comes home."""
    C, d = pieces.ways("time"), pieces.index("time")
    for i, j in ((0, 0), (1, 1), (1, 0)):
        carry, travelling = visit(carry, travelling, i, j)

    def step(state, s):
        carry, travelling = state[0], pieces.turn(state[1], "time", [(i, (i + 1) % C) for i in range(C)])
        # The late half sees every early one. Of keys from a device before this one the early half sees the early, and late keys lie ahead;
        # of keys from one behind it is the late half that sees the late.
        i = jnp.where((d - s) % C < d, 0, 1)
        return visit(*visit(carry, travelling, 1, 0), i, i), None

    (carry, travelling), _ = jax.lax.scan(step, (carry, travelling), jnp.arange(1, C))
    return carry, pieces.turn(travelling, "time", [(i, (i + 1) % C) for i in range(C)])


def _blocks(h: int) -> int:
    return h // BLOCK if h % BLOCK == 0 else 1


def _cut(x, axis: int):
    """Time at `axis` into blocks, in front."""
    n = _blocks(x.shape[axis])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], n, -1, *x.shape[axis + 1 :]), axis, 0)


def _uncut(x, axis: int):
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _scores(q, k, ok, softcap):
    """(masked scores, their slope in the plain ones), f32[B,K,G,t,s]."""
    s = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=wide(q))
    if softcap is None:
        return jnp.where(ok, s, MASKED), 1.0
    t = jnp.tanh(s / softcap)
    return jnp.where(ok, softcap * t, MASKED), 1 - t * t


def _heads_first(q, k, v):
    """[2,B,t,N,H], [2,B,t,K,H] -> [2,B,K,G,t,H], [2,B,K,t,H]"""
    K = k.shape[3]
    q = jnp.moveaxis(q.reshape(*q.shape[:3], K, -1, q.shape[-1]), 2, 4)
    return q, jnp.moveaxis(k, 2, 3), jnp.moveaxis(v, 2, 3)


def _time_first(q):
    """[2,B,K,G,t,H] -> [2,B,t,N,H]"""
    q = jnp.moveaxis(q, 4, 2)
    return q.reshape(*q.shape[:3], -1, q.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(softcap, q, k, v, segments, window):
    """Causal self-attention: q [B,T,N,H], already scaled, k and v [B,T,K,H], segments i32[B,T], window None or a number -> [B,T,N,H]."""
    return _fwd(softcap, q, k, v, segments, window)[0]


def _ok(q_segments, kv_segments, q_slots, kv_slots, window):
    return visible(q_segments, kv_segments, q_slots, kv_slots, causal=True, window=window)[:, None, None]


def _fwd(softcap, q, k, v, segments, window):
    def run(pieces, q, k, v, segments, window):
        segments = _deal(pieces, segments)
        slots = _slots(pieces, segments.shape[-1])
        q, k, v = _heads_first(*(_deal(pieces, x) for x in (q, k, v)))

        def visit(carry, keys, i, j):
            out, lse = carry
            k, v, kv_segments, kv_slots = jax.tree.map(lambda x: x[j], keys)

            def part(block):
                q, q_segments, q_slots = block
                s, _ = _scores(q, k, _ok(q_segments, kv_segments, q_slots, kv_slots, window), softcap)
                top = s.max(-1, keepdims=True)
                p = jnp.exp(s - top)
                total = p.sum(-1, keepdims=True)
                return jnp.einsum("bkgts,bksh->bkgth", p.astype(v.dtype), v, preferred_element_type=wide(q)) / total, top + jnp.log(total)

            o, l = (_uncut(x, 3) for x in jax.lax.map(part, (_cut(q[i], 3), _cut(segments[i], 1), _cut(slots[i], 0))))
            both = jnp.logaddexp(lse[i], l)
            o = out[i] * jnp.exp(lse[i] - both) + o * jnp.exp(l - both)
            return (out.at[i].set(o), lse.at[i].set(both)), keys

        start = jnp.zeros(q.shape, wide(q)), jnp.full((*q.shape[:-1], 1), MASKED, wide(q))
        (out, lse), _ = _round(pieces, visit, start, (k, v, segments, slots))
        out, lse = (_deal(pieces, _time_first(x), back=True) for x in (out, lse))
        return out.astype(v.dtype), lse

    out, lse = shard.local(run, HEADS, HEADS, HEADS, ROWS, "", out=HEADS)(q, k, v, segments, window)
    return out, (q, k, v, segments, window, out, lse)


def _bwd(softcap, saved, g):
    """Probabilities are made again from the scores and lse; dk and dv travel with the keys that they belong to."""

    def run(pieces, q, k, v, segments, window, lse, inner, g):
        segments = _deal(pieces, segments)
        slots = _slots(pieces, segments.shape[-1])
        q, k, v, lse, inner, g = (_deal(pieces, x) for x in (q, k, v, lse, inner, g))
        lse, inner, g = (_heads_first(x, k, v)[0] for x in (lse, inner, g))
        q, k, v = _heads_first(q, k, v)

        def visit(dq, keys, i, j):
            k, v, kv_segments, kv_slots = (x[j] for x in keys[:4])

            def part(sums, block):
                q, q_segments, q_slots, lse, inner, g = block
                s, slope = _scores(q, k, _ok(q_segments, kv_segments, q_slots, kv_slots, window), softcap)
                p = jnp.exp(s - lse)
                dp = jnp.einsum("bkgth,bksh->bkgts", g, v, preferred_element_type=wide(q))
                ds = (p * (dp - inner) * slope).astype(q.dtype)
                dk = jnp.einsum("bkgts,bkgth->bksh", ds, q, preferred_element_type=wide(q))
                dv = jnp.einsum("bkgts,bkgth->bksh", p.astype(g.dtype), g, preferred_element_type=wide(q))
                return (sums[0] + dk, sums[1] + dv), jnp.einsum("bkgts,bksh->bkgth", ds, k, preferred_element_type=wide(q))

            blocks = (_cut(q[i], 3), _cut(segments[i], 1), _cut(slots[i], 0), *(_cut(x[i], 3) for x in (lse, inner, g)))
            sums, own = jax.lax.scan(part, (keys[4][j], keys[5][j]), blocks)
            return dq.at[i].add(_uncut(own, 3)), (*keys[:4], keys[4].at[j].set(sums[0]), keys[5].at[j].set(sums[1]))

        zeros = lambda x: jnp.zeros(x.shape, wide(x))
        dq, (*_, dk, dv) = _round(pieces, visit, zeros(q), (k, v, segments, slots, zeros(k), zeros(v)))
        dk, dv = (jnp.moveaxis(x, 3, 2) for x in (dk, dv))
        return tuple(_deal(pieces, d.astype(x.dtype), back=True) for d, x in ((_time_first(dq), q), (dk, k), (dv, v)))

    q, k, v, segments, window, out, lse = saved
    inner = (g.astype(wide(q)) * out).sum(-1, keepdims=True)
    run = shard.local(run, HEADS, HEADS, HEADS, ROWS, "", HEADS, HEADS, HEADS, out=HEADS)
    return *run(q, k, v, segments, window, lse, inner, g), None, None


attend.defvjp(_fwd, _bwd)
