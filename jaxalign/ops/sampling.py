"""From logits to tokens, a random stream of its own for every row.

`draw` works on logits [V,B], vocabulary first: a sum over the vocabulary then runs over whole vectors of rows. It reads
them twice, for the maximum and for the sums of blocks, and keeps no probabilities.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

COLUMNS = 256  # vocabulary entries per block of the two-level search


def filter_logits(logits, top_k: int = 0, top_p: float = 1.0):
    """Set to -inf all but the top_k entries (0 = all) and, of these, the smallest set whose probability reaches top_p.

    logits f32[B,V]. The entry that crosses top_p is kept (Holtzman et al. 2019, 1904.09751). Ties at the threshold stay.
    """
    V = logits.shape[-1]
    if 0 < top_k < V:
        kth = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if top_p < 1.0:
        ordered = -jnp.sort(-logits, axis=-1)
        p = jax.nn.softmax(ordered, axis=-1)
        keep = jnp.cumsum(p, axis=-1) - p < top_p
        smallest = jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    return logits


def _first(found, weight):
    """The first index where `found` and there is weight, else (rounding may carry an aim past the end) the last that has
    weight. [n,B] -> i32[B]"""
    n = weight.shape[0]
    i = jnp.arange(n, dtype=jnp.int32)[:, None]
    return jnp.minimum(jnp.where(found & (weight > 0), i, n).min(0), jnp.where(weight > 0, i, 0).max(0))


def _blocks(z, top):
    """f[V,B] -> sums of exp(z - top) over blocks of the vocabulary, [ceil(V / COLUMNS), B]; the last may be a short one."""
    V, B = z.shape
    whole = V - V % COLUMNS
    parts = [jnp.exp(z[:whole].reshape(-1, COLUMNS, B) - top).sum(1)] if whole else []
    parts += [jnp.exp(z[whole:] - top).sum(0, keepdims=True)] if V > whole else []
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def inverse_cdf(u, z, top=None, blocks=None):
    """The first index whose cumulative weight exp(z) exceeds u * total. u f32[B] in [0,1), z f32[V,B], -inf for no weight -> i32[B].

    One uniform a row and a search in two levels: Gumbel noise over a whole vocabulary costs as much as a small model.
    """
    V, B = z.shape
    top = z.max(0) if top is None else top
    blocks = _blocks(z, top) if blocks is None else blocks
    reached = jnp.cumsum(blocks, 0)
    aim = u * reached[-1]
    block = _first(reached > aim, blocks)
    at = block * COLUMNS + jnp.arange(COLUMNS, dtype=jnp.int32)[:, None]
    row = jnp.where(at < V, jnp.exp(jnp.take_along_axis(z, jnp.minimum(at, V - 1), 0) - top), 0.0)
    inner = jnp.cumsum(row, 0)
    before = jnp.take_along_axis(reached, block[None], 0)[0] - inner[-1]
    rest = jnp.maximum(aim - before, 0)  # below 0 by rounding, the first entry would win even with no weight
    return block * COLUMNS + _first(inner > rest, row)


def draw(u, logits, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
    """As `sample`, with a uniform per row, f32[B], and logits f32[V,B]."""
    V = logits.shape[0]
    z = logits.astype(jnp.float32)
    z = z if temperature in (0, 1) else z / temperature
    top = z.max(0)
    blocks = _blocks(z, top)
    if temperature == 0:
        tokens = jnp.where(z == top, jnp.arange(V, dtype=jnp.int32)[:, None], V - 1).min(0)
    elif 0 < top_k < V or top_p < 1:
        tokens = inverse_cdf(u, filter_logits(z.T, top_k, top_p).T, top)
    else:
        tokens = inverse_cdf(u, z, top, blocks)
    return tokens, jnp.take_along_axis(z, tokens[None], 0)[0] - top - jnp.log(blocks.sum(0))


def sample(keys, logits, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
    """logits [B,V] -> (tokens i32[B], logp f32[B] at this temperature, before any truncation). temperature 0 is greedy, with logp at 1.

    keys: one per row, folded from the row's id and the number of tokens it has: a draw depends on nothing else.
    """
    return draw(jax.vmap(jax.random.uniform)(keys), logits.T, temperature, top_k, top_p)
