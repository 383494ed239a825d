"""Reductions under a mask in {0, 1}; an empty mask gives 0, never NaN. Source: methods.md section 0.2 (TRL's core.py)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def masked_sum(x, mask, axis=None):
    """Sum of x where mask is 1. `where` and not a product: garbage under the mask may be inf."""
    return jnp.where(mask > 0, x, 0).sum(axis)


def masked_mean(x, mask, axis=None):
    return masked_sum(x, mask, axis) / jnp.maximum(mask.sum(axis), 1)


def masked_var(x, mask, unbiased: bool = True):
    """Variance over the valid entries, Bessel-corrected unless told otherwise."""
    n = mask.sum()
    centred = jnp.where(mask > 0, x - masked_mean(x, mask), 0)
    return (centred**2).sum() / jnp.maximum(n - (1 if unbiased else 0), 1)


def masked_whiten(x, mask, shift_mean: bool = True):
    """(x - mean) / std over the valid entries; the mean is added back unless `shift_mean`. 0 outside the mask."""
    mean = masked_mean(x, mask)
    out = (x - mean) * jax.lax.rsqrt(masked_var(x, mask) + 1e-8)
    return jnp.where(mask > 0, out if shift_mean else out + mean, 0)


def population_whiten(x, mask, shift_mean: bool = True):
    """`masked_whiten` with the population's variance, which divides by n (lm-human-preferences, OpenRLHF)."""
    mean = masked_mean(x, mask)
    out = (x - mean) * jax.lax.rsqrt(masked_var(x, mask, unbiased=False) + 1e-8)
    return jnp.where(mask > 0, out if shift_mean else out + mean, 0)


WHITEN = {"bessel": masked_whiten, "population": population_whiten}


def top_share(x, mask, share: float):
    """Where x is among the largest `share` of the valid entries, f32 like mask (2506.01939: the tokens of high entropy)."""
    edge = jnp.nanquantile(jnp.where(mask > 0, x, jnp.nan), 1 - share)
    return jnp.where(mask > 0, x >= edge, False).astype(jnp.float32)


def segment_sums(x, segments):
    """At each token, the sum of x over the tokens of its own segment. x f32[B,T], segments [B,T] -> f32[B,T]."""
    edge = jnp.concatenate([jnp.zeros_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], 1)
    run = jnp.cumsum(edge, 1)
    return jax.vmap(lambda v, r: jax.ops.segment_sum(v, r, v.shape[0])[r])(x, run)
