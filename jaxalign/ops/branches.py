"""Several continuations of one text in one row. The text (the trunk) is read once; each continuation (a branch) sees the
trunk and itself, and its positions go on from the trunk's end.

Rows with branches carry their segments as u32: segment + branch * 2^16, branch 0 being the trunk. Rows without carry i32.
So the type of an array says which rule holds, and programs without branches are compiled as if there were none.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

SHIFT = 16  # so 65,535 segments a row, and as many branches each


def pack(segment, branch):
    """segment, branch i32[...] -> u32; padding (segment 0) stays 0. numpy or jax."""
    xp = jnp if isinstance(segment, jax.Array) else np
    segment = segment.astype(np.uint32)
    return xp.where(segment != 0, segment + (xp.asarray(branch, np.uint32) << np.uint32(SHIFT)), np.uint32(0))


def branched(segments) -> bool:
    return segments.dtype == np.uint32


def trunk(segments):
    """The segment without its branch; of rows without branches, the segment."""
    return segments & np.uint32(2**SHIFT - 1) if branched(segments) else segments


def same(q_segments, kv_segments):
    """bool[B,T,S]: whether key and query lie in one segment, the key in the query's own branch or in the trunk; padding nowhere."""
    q, k = q_segments[:, :, None], kv_segments[:, None, :]
    own = q == k
    return (own | (trunk(q) == k) if branched(q_segments) else own) & (q != 0)


def predecessors(segments) -> jax.Array:
    """i32[B,T]: the slot whose hidden state predicts token t: t - 1, the trunk's last where t begins a branch, and -1 where t
    begins a segment or is padding. A trunk stands before its branches in the row, with no other trunk between."""
    slots = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    first = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], 1)
    if not branched(segments):
        return jnp.where(first | (segments == 0), -1, slots - 1)
    last = jax.lax.cummax(jnp.where((segments != 0) & (trunk(segments) == segments), slots, -1), axis=1)
    of = jnp.take_along_axis(segments, jnp.maximum(last, 0), 1)
    at = jnp.where((trunk(segments) != segments) & (of == trunk(segments)), last, -1)
    return jnp.where(segments == 0, -1, jnp.where(first, at, slots - 1))


def join(rows, prompt: int, branches: int):
    """(trunks and completions in shared rows, their u32 segments): f(x) and segments.

    rows: anything with `mask` and `segments` [R,P+N] in which `branches` consecutive rows hold the same text, at the left,
    followed by a completion of at most N tokens; `prompt` is P. f maps x [R,P+N] to [R/branches, P + branches N]: the text
    once, then one completion after another, each at a slot of its own.
    """
    segments = rows.segments
    new = segments.shape[1] - prompt
    length = ((segments != 0) & (jnp.cumsum(rows.mask, 1) == 0)).sum(1)
    at = length[:, None] + jnp.arange(new)
    inside = at < segments.shape[1]

    def f(x):
        tail = jnp.where(inside, jnp.take_along_axis(x, jnp.minimum(at, segments.shape[1] - 1), 1), 0)
        head = jnp.where(jnp.arange(prompt) < length[::branches, None], x[::branches, :prompt], 0)
        return jnp.concatenate([head, tail.reshape(-1, branches * new)], 1)

    branch = jnp.repeat(jnp.arange(branches + 1), np.array([prompt] + [new] * branches), total_repeat_length=prompt + branches * new)
    return f, pack((f(segments) != 0).astype(jnp.int32), jnp.broadcast_to(branch, (segments.shape[0] // branches, branch.shape[0])))
