"""Keys and values of the tokens that a decoder has read, kept for those that follow. A cache is a dict: "layers" (what `nn.stack` hands
to each layer), "segments" i32[B,S], "length" (slots in use, i32[] or i32[B]), and "positions" i32[B,S] where a window counts tokens."""

from __future__ import annotations

from typing import Callable

import jax
import jax.numpy as jnp

from jaxalign.types import Tree


def init(layers: int, batch: int, size: int, kv_heads: int, width: int, dtype, scan: bool, positions: bool = False) -> Tree:
    """Slots are written in order for all rows at once; a slot whose segment is 0 is a hole that nobody sees.
    `positions`: keep those of the keys too, because a window counts tokens and not slots.

    Stored [B,K,S,H], as `attend` multiplies: with time before heads every step would transpose the whole cache.
    """
    shape = (batch, kv_heads, size, width)
    if scan:
        kv = {"k": jnp.zeros((layers, *shape), dtype), "v": jnp.zeros((layers, *shape), dtype)}
    else:
        kv = tuple({"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)} for _ in range(layers))
    slots = {"segments": jnp.zeros((batch, size), jnp.int32), "length": jnp.zeros((), jnp.int32)}
    return {"layers": kv, **slots, **({"positions": slots["segments"]} if positions else {})}


def reserve(cache: Tree, segments: jax.Array, positions: jax.Array | None = None) -> tuple[Tree, jax.Array, jax.Array]:
    """Make room for T new tokens: (cache with their segments, kv segments [B,S], index of the first new slot, i32[], or
    i32[B] where "length" is: rows of their own lengths, each written behind its own)."""
    start = cache["length"]
    new = {"segments": segments} | ({"positions": positions} if "positions" in cache else {})
    if start.ndim:
        put = lambda old, v: old.at[_slots(start, v)].set(v, mode="drop")
    else:
        put = lambda old, v: jax.lax.dynamic_update_slice_in_dim(old, v, start, axis=1)
    new = {k: put(cache[k], v) for k, v in new.items()}
    return {**cache, **new, "length": start + segments.shape[1]}, new["segments"], start


def _slots(start: jax.Array, new: jax.Array):
    """Where new [B,T,...] goes in each row. What lies past the end is dropped by the writer; a slice would be moved back over older slots."""
    rows, T = new.shape[:2]
    return jnp.arange(rows)[:, None], start[:, None] + jnp.arange(T)


def write(kv: dict, k: jax.Array, v: jax.Array, start: jax.Array) -> tuple[dict, jax.Array, jax.Array]:
    """k and v [B,T,K,H] into the slots from `start` on: (cache, all its keys [B,S,K,H], all its values)."""
    if start.ndim:
        put = lambda old, new: old.at[(at := _slots(start, new))[0], :, at[1]].set(new.astype(old.dtype), mode="drop")
    else:
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, jnp.moveaxis(new, 1, 2).astype(old.dtype), start, axis=2)
    kv = {"k": put(kv["k"], k), "v": put(kv["v"], v)}
    return kv, jnp.moveaxis(kv["k"], 2, 1), jnp.moveaxis(kv["v"], 2, 1)


def map_rows(f: Callable, cache: Tree, *others: Tree) -> Tree:
    """f(leaf, *leaves of others, axis of the rows) on all of a cache that has rows; one length for all rows stays as it is."""
    rows = lambda x, *more: f(x, *more, max(x.ndim - 4, 0)) if x.ndim else x  # keys are [..., B, K, S, H]
    return jax.tree.map(rows, cache, *others)


def grow(cache: Tree, size: int) -> Tree:
    """The same cache with `size` slots: prefill attends over the prompt alone, decoding over what it needs."""
    extra = size - cache["segments"].shape[1]

    def pad(x):
        axis = x.ndim - 2  # [.., K, S, H]
        return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])

    slots = {k: jnp.pad(cache[k], ((0, 0), (0, extra))) for k in ("segments", "positions") if k in cache}
    return {**cache, "layers": jax.tree.map(pad, cache["layers"]), **slots}
