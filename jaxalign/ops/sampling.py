"""From logits to tokens, a random stream of its own for every row."""

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


def inverse_cdf(u, p):
    """The first index whose cumulative weight exceeds u * total. u f32[B] in [0,1), p f32[B,V] >= 0 -> i32[B].

    One uniform a row and a search in two levels: Gumbel noise over a whole vocabulary costs as much as a small model.
    """
    B, V = p.shape
    p = jnp.pad(p, ((0, 0), (0, -V % COLUMNS))).reshape(B, -1, COLUMNS)
    blocks = jnp.cumsum(p.sum(-1), -1)
    aim = u * blocks[:, -1]
    # Rounding may carry the aim past the end: step back to the last block, and in it the last entry, that has weight.
    last = lambda w: (w.shape[-1] - 1 - jnp.argmax((w > 0)[:, ::-1], -1)).astype(jnp.int32)
    block = jnp.minimum((blocks <= aim[:, None]).sum(-1).astype(jnp.int32), last(p.sum(-1)))
    row = jnp.take_along_axis(p, block[:, None, None], 1)[:, 0]
    inner = jnp.cumsum(row, -1)
    before = jnp.take_along_axis(blocks, block[:, None], 1)[:, 0] - inner[:, -1]
    rest = jnp.maximum(aim - before, 0)  # below 0 by rounding, the first entry would win even with no weight
    column = jnp.minimum((inner <= rest[:, None]).sum(-1).astype(jnp.int32), last(row))
    return block * COLUMNS + column


def sample(keys, logits, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
    """(tokens i32[B], logp f32[B] at this temperature, before any truncation). temperature 0 is greedy, with logp at 1.

    keys: one per row, folded from the row's id and the number of tokens it has: a draw depends on nothing else.
    """
    scaled = logits.astype(jnp.float32) / (temperature or 1.0)
    lse = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    if temperature == 0:
        tokens = jnp.argmax(logits, -1).astype(jnp.int32)
    else:
        kept = filter_logits(scaled, top_k, top_p)
        tokens = inverse_cdf(jax.vmap(jax.random.uniform)(keys), jnp.exp(kept - lse))
    return tokens, (jnp.take_along_axis(scaled, tokens[:, None], -1) - lse)[:, 0]
