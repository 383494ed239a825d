"""Reward models from human comparisons: Bradley-Terry pairs and K-rankings. Equations first, then the objectives."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.types import Loss, Objective, Pairs, Rankings, ScalarModel, Term


def bradley_terry(chosen, rejected, margin=0.0):
    """-log sigma(r_w - r_l - m), per pair (Llama 2, 2307.09288, eq. 2; m = 0: InstructGPT)."""
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def centring(chosen, rejected):
    """(r_w + r_l)^2, per pair: the sum, not each one's square (Eisenstein et al. 2312.09244, eq. 2)."""
    return (chosen + rejected) ** 2


def strict_pairs(rank, valid):
    """f32[B,K,K]: 1 at (i, j) where candidate i is ranked strictly better than j. Ties give no pair."""
    both = valid[:, :, None] * valid[:, None, :]
    return both * (rank[:, :, None] < rank[:, None, :])


def ranking(rewards, rank, valid):
    """Per prompt, the mean over its strict pairs of -log sigma(r_i - r_j) (InstructGPT 2203.02155, eq. 1).

    rewards f32[B,K]; rank i32[B,K], smaller is better; valid f32[B,K]. -> f32[B], 0 for a prompt without a strict pair.
    With ties, C(K,2) becomes the number of strict pairs.
    """
    pairs = strict_pairs(rank, valid)
    gap = jnp.where(pairs > 0, rewards[:, :, None] - rewards[:, None, :], 0.0)  # an empty slot may hold anything
    return (pairs * bradley_terry(gap, 0.0)).sum((1, 2)) / jnp.maximum(pairs.sum((1, 2)), 1)


def pairs(model: ScalarModel, *, centre: float = 0.0) -> Objective:
    """Bradley-Terry on `Pairs`; a pair whose completion mask is empty weighs 0. `centre` is eta of `centring`."""

    def loss(params, frozen, aux, batch: Pairs, key, stats) -> Loss:
        B = batch.chosen.tokens.shape[0]
        rows = jax.tree.map(lambda w, l: jnp.concatenate([w, l]), batch.chosen, batch.rejected)
        r = model.reward(params, rows.tokens, rows.segments, rows.positions)
        w, l = r[:B], r[B:]
        real = (batch.chosen.mask.any(1) & batch.rejected.mask.any(1)).astype(jnp.float32)
        n = real.sum()
        terms = {"reward": Term((real * bradley_terry(w, l, jnp.where(real > 0, batch.margin, 0.0))).sum(), n)}
        if centre:
            terms["centring"] = Term((real * centring(w, l)).sum(), n, centre)
        return Loss(terms, _metrics(jax.lax.stop_gradient(w), jax.lax.stop_gradient(l), real))

    return Objective(loss)


def rankings(model: ScalarModel, *, centre: float = 0.0) -> Objective:
    """All pairs of a prompt from one forward of its K candidates, in one batch element (InstructGPT section 3.5)."""

    def loss(params, frozen, aux, batch: Rankings, key, stats) -> Loss:
        B, K, T = batch.candidates.tokens.shape
        rows = jax.tree.map(lambda a: a.reshape(B * K, T), batch.candidates)
        r = model.reward(params, rows.tokens, rows.segments, rows.positions).reshape(B, K)
        strict = strict_pairs(batch.rank, batch.valid)
        n = strict.any((1, 2)).astype(jnp.float32).sum()
        terms = {"reward": Term(ranking(r, batch.rank, batch.valid).sum(), n)}
        if centre:
            square = centring(r[:, :, None], r[:, None, :])
            terms["centring"] = Term(((strict * square).sum((1, 2)) / jnp.maximum(strict.sum((1, 2)), 1)).sum(), n, centre)
        r = jax.lax.stop_gradient(r)
        return Loss(terms, _metrics(r[:, :, None], r[:, None, :], strict))

    return Objective(loss)


def _metrics(w, l, real):
    """TRL's names. A tie counts as wrong; `tie_rate` says how many there were."""
    n = real.sum()
    return {
        "accuracy": ((real * (w > l)).sum(), n),
        "margin": ((real * (w - l)).sum(), n),
        "mean_reward": ((real * (w + l) / 2).sum(), n),
        "tie_rate": ((real * (w == l)).sum(), n),
    }
