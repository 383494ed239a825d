"""Mixture of experts without capacity: every token reaches the experts it chose, none is dropped.

Tokens are sorted by expert and each expert multiplies its own run of rows (`jax.lax.ragged_dot`), as MegaBlocks does
(Gale et al. 2022, 2211.15841). n rows, D dim, E experts, k of them per token, F an expert's width.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.ops import nn


class Load(NamedTuple):
    """What the load-balancing loss needs, as sums over tokens, so that layers and batches add up."""

    chosen: jax.Array  # f32[E]; how many tokens chose each expert (no gradient)
    probability: jax.Array  # f32[E]; sum of the router's probabilities
    tokens: jax.Array  # f32[]


def route(x: jax.Array, router, k: int, renormalise: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x f[n,D] -> (weights [n,k], experts i32[n,k], probabilities f32[n,E]). `renormalise`: the k weights sum to 1."""
    p = jax.nn.softmax(nn.linear(x, router).astype(nn.wide(x)), -1)
    weight, expert = jax.lax.top_k(p, k)
    return (weight / weight.sum(-1, keepdims=True) if renormalise else weight).astype(x.dtype), expert, p


def experts(x: jax.Array, weight: jax.Array, expert: jax.Array, params, activation: Callable) -> jax.Array:
    """Gated feed-forward of every token by its k experts, weighted: f[n,D] -> f[n,D]. params: gate, up [E,D,F], down [E,F,D]."""
    n, k = expert.shape
    order = jnp.argsort(expert.reshape(-1), stable=True)  # by expert; entry i of the flat list is token i // k
    gate, up, down = (nn.weight(params[name], x.dtype) for name in ("gate", "up", "down"))
    sizes = jnp.bincount(expert.reshape(-1), length=gate.shape[0])
    rows = x[order // k]
    h = activation(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    y = jax.lax.ragged_dot(h, down, sizes) * weight.reshape(-1)[order, None]
    return jnp.zeros_like(x).at[order // k].add(y)


def load(probabilities: jax.Array, expert: jax.Array, real: jax.Array) -> Load:
    """probabilities f32[n,E], expert i32[n,k], real f32[n] (0 = padding, which is routed but not counted)."""
    hot = (expert[..., None] == jnp.arange(probabilities.shape[-1])).any(1)
    return Load(jax.lax.stop_gradient((hot * real[:, None]).sum(0)), (probabilities * real[:, None]).sum(0), real.sum())


def balance(own: Load, share: jax.Array | None = None) -> jax.Array:
    """tokens x E x sum over experts of (share of tokens that chose it) x (mean probability): 1 x k per token where the load
    is even (Fedus et al. 2021, 2101.03961, eq. 4-6; over all layers together, as in transformers).

    A product of two means is no sum over examples. `share` f32[E] is that of the whole step, without gradient: with it the
    sum over micro-batches is exactly the loss of the whole batch, and so is its gradient.
    """
    share = own.chosen / jnp.maximum(own.tokens, 1.0) if share is None else share
    return share.size * (jax.lax.stop_gradient(share) * own.probability).sum()
