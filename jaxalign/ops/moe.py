"""Mixture of experts without capacity: every token reaches the experts it chose, none is dropped.

Tokens are sorted by expert and each expert multiplies its own run of rows (`jax.lax.ragged_dot`), as MegaBlocks does
(Gale et al. 2022, 2211.15841). D dim, E experts, k of them per token, F an expert's width; "..." is rows, or rows and time.

On a mesh with an expert axis each device holds E / ways experts. The rows that this axis cuts are gathered along it, every
device lets its own experts answer, and the answers are summed and scattered: nothing is dropped and no weight moves.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import shard
from jaxalign.ops import nn


class Load(NamedTuple):
    """What the load-balancing loss needs, as sums over tokens, so that layers and batches add up."""

    chosen: jax.Array  # f32[E]; how many tokens chose each expert (no gradient)
    probability: jax.Array  # f32[E]; sum of the router's probabilities
    tokens: jax.Array  # f32[]


def route(x: jax.Array, router, k: int, renormalise: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x f[...,D] -> (weights [...,k], experts i32[...,k], probabilities f32[...,E]). `renormalise`: the k weights sum to 1."""
    p = jax.nn.softmax(nn.linear(x, router).astype(nn.wide(x)), -1)
    weight, expert = jax.lax.top_k(p, k)
    return (weight / weight.sum(-1, keepdims=True) if renormalise else weight).astype(x.dtype), expert, p


def experts(x: jax.Array, weight: jax.Array, expert: jax.Array, params, activation: Callable) -> jax.Array:
    """Gated feed-forward of every token by its k experts, weighted: f[...,D] -> f[...,D]. params: gate, up [E,D,F], down [E,F,D]."""

    def run(pieces, x, weight, expert, gate, up, down):
        shape, k = x.shape, expert.shape[-1]
        E, shared = gate.shape[0], set(pieces.over("expert")) <= set(pieces.over("batch"))
        gate, up, down = pieces.whole(gate, 1, "embed"), pieces.whole(up, 1, "embed"), pieces.whole(down, 2, "embed")
        x, weight, expert = (a.reshape(-1, a.shape[-1]) for a in (x, weight, expert))
        if shared:
            x, weight, expert = (pieces.whole(a, 0, "expert") for a in (x, weight, expert))
        own = expert.reshape(-1) - pieces.index("expert") * E
        own = jnp.where((own >= 0) & (own < E), own, E)
        order = jnp.argsort(own, stable=True)  # by expert, those of other devices last; entry i of the flat list is token i // k
        sizes = (own[:, None] == jnp.arange(E)).sum(0, dtype=jnp.int32)
        rows = x[order // k]
        gate, up = nn.name((jax.lax.ragged_dot(rows, gate, sizes), jax.lax.ragged_dot(rows, up, sizes)), "mlp")
        h = activation(gate) * up
        y = jax.lax.ragged_dot(h, down, sizes) * weight.reshape(-1)[order, None]
        out = jnp.zeros_like(x).at[order // k].add(y)
        return pieces.sum(out, "mlp", "expert", scatter=(0, "expert") if shared else None).reshape(shape)

    rows = " ".join(("batch", "time")[: x.ndim - 1]) + " ."
    into, back = "expert embed mlp", "expert mlp embed"
    return shard.local(run, rows, rows, rows, into, into, back, out=rows)(x, weight, expert, *(nn.weight(params[name], x.dtype) for name in ("gate", "up", "down")))


def load(probabilities: jax.Array, expert: jax.Array, real: jax.Array) -> Load:
    """probabilities f32[...,E], expert i32[...,k], real f32[...] (0 = padding, which is routed but not counted)."""
    hot = (expert[..., None] == jnp.arange(probabilities.shape[-1])).any(-2)
    total = lambda x: (x * real[..., None]).sum(tuple(range(real.ndim)))
    return Load(jax.lax.stop_gradient(total(hot)), total(probabilities), real.sum())


def balance(own: Load, share: jax.Array | None = None) -> jax.Array:
    """tokens x E x sum over experts of (share of tokens that chose it) x (mean probability): 1 x k per token where the load
    is even (Fedus et al. 2021, 2101.03961, eq. 4-6; over all layers together, as in transformers).

    A product of two means is no sum over examples. `share` f32[E] is that of the whole step, without gradient: with it the
    sum over micro-batches is exactly the loss of the whole batch, and so is its gradient.
    """
    share = own.chosen / jnp.maximum(own.tokens, 1.0) if share is None else share
    return share.size * (jax.lax.stop_gradient(share) * own.probability).sum()
