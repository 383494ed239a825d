"""Preference losses on rankings of K answers to a prompt. Equations on small arrays first.

scores f32[B,K]; rank i32[B,K], smaller is better, equal is a tie; valid f32[B,K].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.objectives.preference import sequence_logps
from jaxalign.types import Loss, Model, Objective, Rankings, Term


def beaten(rank, valid):
    """f32[B,K,K]: 1 where candidate i is strictly better than candidate j."""
    return (rank[:, :, None] < rank[:, None, :]).astype(jnp.float32) * valid[:, :, None] * valid[:, None, :]


def plackett_luce_loss(scores, rank, valid):
    """-sum_k log(exp(s_k) / sum over k and all worse than k of exp(s)) (2305.18290 appendix A.3 and eq. 18, with scores beta (log pi - log ref)).

    Of tied candidates each stands against the worse ones alone; of two without a tie this is DPO's loss.
    """
    scores = jnp.where(valid > 0, scores, 0.0)
    worse = beaten(rank, valid) > 0
    own = jnp.eye(scores.shape[1], dtype=bool)[None]
    among = jnp.where(worse | own, scores[:, None, :], -jnp.inf)
    return (valid * (jax.nn.logsumexp(among, -1) - scores)).sum(-1)


def rrhf_loss(scores, rank, valid):
    """sum over pairs, i better than j, of max(0, s_j - s_i), with scores the mean log-prob per token (RRHF, 2304.05302 eq. 3)."""
    scores = jnp.where(valid > 0, scores, 0.0)
    return (beaten(rank, valid) * jax.nn.relu(scores[:, None, :] - scores[:, :, None])).sum((1, 2))


def ranking_logps(model: Model, params, batch: Rankings):
    """(log-prob sums f32[B,K], token counts f32[B,K], entropy sum) of the candidates, each read once."""
    shape = batch.rank.shape
    rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch.candidates)
    logp, n, entropy = sequence_logps(model, params, rows._replace(mask=rows.mask * batch.valid.reshape(-1, 1)))
    return logp.reshape(shape), n.reshape(shape), entropy


def _metrics(scores, logp, n, rank, valid, real, entropy) -> dict:
    """Of all strict pairs: how often the better has the higher score, and by how much."""
    scores, logp, entropy = jax.lax.stop_gradient((scores, logp, entropy))
    pairs = beaten(rank, valid)
    ahead = scores[:, :, None] - scores[:, None, :]
    best = valid * (rank == _least(rank, valid)) * real[:, None]
    return {
        "rewards/accuracies": ((pairs * (ahead > 0)).sum(), pairs.sum()),
        "rewards/margins": ((pairs * ahead).sum(), pairs.sum()),
        "logps/chosen": ((best * logp).sum(), best.sum()),
        "entropy": (entropy, n.sum()),
    }


def _least(rank, valid):
    return jnp.where(valid > 0, rank, jnp.iinfo(jnp.int32).max).min(1, keepdims=True)


def pl_dpo(model: Model, *, beta: float = 0.1) -> Objective:
    """DPO on whole rankings under the Plackett-Luce model (Rafailov et al. 2023, 2305.18290 appendix A.3), averaged over prompts that rank anything."""

    def loss(params, frozen, aux, batch: Rankings, key, stats) -> Loss:
        logp, n, entropy = ranking_logps(model, params, batch)
        valid = batch.valid * (n > 0)
        real = (beaten(batch.rank, valid).sum((1, 2)) > 0).astype(jnp.float32)
        ref = 0.0 if batch.ref is None else batch.ref
        scores = beta * jnp.where(valid > 0, logp - ref, 0.0)
        terms = {"preference": Term((real * plackett_luce_loss(scores, batch.rank, valid)).sum(), real.sum())}
        return Loss(terms, _metrics(scores, logp, n, batch.rank, valid, real, entropy))

    return Objective(loss)


def rrhf(model: Model, *, alpha: float = 1.0) -> Objective:
    """Rank responses to align with human feedback (Yuan et al. 2023, 2304.05302): hinge on mean log-probs, + alpha x cross entropy of the
    best answer (of all that share the first rank), a mean over tokens; no reference."""

    def loss(params, frozen, aux, batch: Rankings, key, stats) -> Loss:
        logp, n, entropy = ranking_logps(model, params, batch)
        valid = batch.valid * (n > 0)
        real = (beaten(batch.rank, valid).sum((1, 2)) > 0).astype(jnp.float32)
        scores = logp / jnp.maximum(n, 1)
        best = valid * (batch.rank == _least(batch.rank, valid)) * real[:, None]
        terms = {
            "preference": Term((real * rrhf_loss(scores, batch.rank, valid)).sum(), real.sum()),
            "nll": Term(-(best * logp).sum(), (best * n).sum(), alpha),
        }
        return Loss(terms, _metrics(scores, logp, n, batch.rank, valid, real, entropy))

    return Objective(loss)
