"""What is chosen out of groups of answers: the best against the worst, one's own against a rival's, the best alone.

Each function is a `methods.Method.experience`: rollouts and their scores -> (batch, metrics f32[] each). Unscorable answers
(NaN) are never chosen. All shapes are fixed: what is left out keeps its row, with an empty mask, and weighs 0.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxalign import shard
from jaxalign.objectives.preference import pair_logps
from jaxalign.ops.logprob import targets
from jaxalign.rl import rewards
from jaxalign.rl.experience import token_logps
from jaxalign.types import Duels, Model, Pairs, RivalPairs, Rollout, Tokens


def grouped(x, group: int):
    """[B * group, ...] -> [B, group, ...]"""
    return x.reshape(-1, group, *x.shape[1:])


def picked(x, which):
    """Row `which` i32[B] or, of several, i32[B,k] of each group: x [B, group, ...] -> [B, ...] or [B * k, ...]."""
    many = which[:, None] if which.ndim == 1 else which
    out = jnp.take_along_axis(x, many.reshape(*many.shape, *(1,) * (x.ndim - 2)), 1)
    out = out.reshape(-1, *x.shape[2:])
    return shard.constrain(out, "batch", *(None,) * (out.ndim - 1))


def _rows(rollout: Rollout, group: int) -> Tokens:
    """Leaves [B, group, T], the mask that of what is predicted."""
    mask = targets(rollout.mask, rollout.segments)
    return Tokens(*(grouped(x, group) for x in (rollout.tokens, mask, rollout.segments, rollout.positions)))


def _measured(score, rollout: Rollout) -> dict:
    length = targets(rollout.mask, rollout.segments).sum(1)
    return {
        "objective/scores": jnp.nanmean(score),
        "objective/scores_std": jnp.nanstd(score),
        "completions/mean_length": length.mean(),
        "completions/truncated_frac": rollout.truncated.mean(),
    }


def _f32(metrics: dict) -> dict:
    return {k: v.astype(jnp.float32) for k, v in metrics.items()}


def _pairs(model: Model, reference, rollout: Rollout, score, group: int):
    """(Pairs, which was best i32[B], metrics): of each group the best against the worst; a tie teaches nothing and weighs 0."""
    s, rows = grouped(score, group), _rows(rollout, group)
    high, low = jnp.where(jnp.isnan(s), -jnp.inf, s), jnp.where(jnp.isnan(s), jnp.inf, s)
    best, worst = jnp.argmax(high, 1), jnp.argmin(low, 1)
    gap = high.max(1) - low.min(1)
    told = gap > 0
    side = lambda which: (lambda t: t._replace(mask=t.mask * told[:, None]))(jax.tree.map(lambda x: picked(x, which), rows))
    zero = jnp.zeros(s.shape[0], jnp.float32)
    pairs = Pairs(side(best), side(worst), zero, zero, jnp.where(told, gap, 0.0).astype(jnp.float32))
    if reference is not None:
        chosen, rejected, *_ = pair_logps(model, reference, pairs)
        pairs = pairs._replace(ref_chosen=chosen, ref_rejected=rejected)
    metrics = _measured(score, rollout) | {"objective/scores_margin": pairs.margin.mean(), "objective/ties": 1 - told.mean()}
    return pairs, best, metrics


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("group", "missing_eos_penalty", "clip_score"))
def pair_experience(model: Model, params, reference, rollout: Rollout, scores, *, group: int, missing_eos_penalty: float = 0.0, clip_score: float | None = None):
    """(Pairs, metrics): of `group` answers of the policy the best against the worst (two: online DPO, OAIF 2402.04792; more: iterative
    DPO's choice, 2312.16682). reference None: the loss has none. Log-probs of pairs are at temperature 1, as offline."""
    score = rewards.adjust(scores, rollout.truncated, missing_eos_penalty=missing_eos_penalty, clip=clip_score)
    pairs, _, metrics = _pairs(model, reference, rollout, score, group)
    return pairs, _f32(metrics)


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("group", "missing_eos_penalty", "clip_score"))
def rival_pairs(model: Model, params, reference, rollout: Rollout, scores, *, group: int, missing_eos_penalty: float = 0.0, clip_score: float | None = None):
    """(RivalPairs, metrics): the policy's answer against the rival's, which stands last; group is 1 (XPO)."""
    score = rewards.adjust(scores, rollout.truncated, missing_eos_penalty=missing_eos_penalty, clip=clip_score)
    pairs, best, metrics = _pairs(model, reference, rollout, score, group + 1)
    s = grouped(score, group + 1)
    metrics |= {"objective/model_scores": jnp.nanmean(s[:, :group]), "objective/ref_scores": jnp.nanmean(s[:, group])}
    both = {k: getattr(pairs, k) for k in RivalPairs._fields if k in Pairs._fields}
    return RivalPairs(**both, rival_won=(best == group).astype(jnp.float32)), _f32(metrics)


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("group", "temperature", "missing_eos_penalty", "clip_score"))
def duels(model: Model, params, reference, rollout: Rollout, scores, *, group: int, temperature: float = 1.0, missing_eos_penalty: float = 0.0, clip_score: float | None = None):
    """(Duels, metrics): each of `group` answers of the policy against the rival's, which stands last: P = sigma(its score - the
    rival's), what Bradley-Terry says of rewards, and what a judge said itself (`rl.comparisons.pairwise`). Nash-MD."""
    score = rewards.adjust(scores, rollout.truncated, missing_eos_penalty=missing_eos_penalty, clip=clip_score)
    s = grouped(score, group + 1)
    gap = (s[:, :group] - s[:, group:]).reshape(-1)
    own = jnp.broadcast_to(jnp.arange(group), (s.shape[0], group))
    rows = jax.tree.map(lambda x: picked(x, own), _rows(rollout, group + 1))
    rows = rows._replace(mask=rows.mask * ~jnp.isnan(gap)[:, None])
    preferred = jax.nn.sigmoid(jnp.nan_to_num(gap))
    ref = jnp.zeros_like(rows.mask) if reference is None else token_logps(model, reference, rows, temperature=temperature).logp
    metrics = _measured(score, rollout) | {"objective/model_scores": jnp.nanmean(s[:, :group]), "objective/ref_scores": jnp.nanmean(s[:, group])}
    return Duels(*rows, preferred, ref * rows.mask), _f32(metrics)


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("group", "keep", "quantile", "threshold", "missing_eos_penalty", "clip_score"))
def best_experience(
    model: Model,
    params,
    reference,
    rollout: Rollout,
    scores,
    *,
    group: int,
    keep: int = 1,
    quantile: float = 0.0,
    threshold: float | None = None,
    missing_eos_penalty: float = 0.0,
    clip_score: float | None = None,
):
    """(Tokens [B * keep, T], metrics): of each group the `keep` best answers, no text twice, as demonstrations.

    keep 1 is RAFT (2304.06767); its global form, the best 1/K of all, is quantile 1 - 1/K with keep = group: only scores that reach
    this quantile of the whole rollout. threshold: only scores that reach it (correct ones: ReST-EM 2312.06585, RFT 2308.01825).
    """
    score = rewards.adjust(scores, rollout.truncated, missing_eos_penalty=missing_eos_penalty, clip=clip_score)
    s, rows = grouped(score, group), _rows(rollout, group)
    good = ~jnp.isnan(s) & first_of_its_kind(rows)
    if threshold is not None:
        good &= s >= threshold
    if quantile:
        good &= s >= jnp.nanquantile(score, quantile)
    value, which = jax.lax.top_k(jnp.where(good, s, -jnp.inf), keep)  # of equals the one sampled first
    kept = jnp.isfinite(value).reshape(-1)
    out = jax.tree.map(lambda x: picked(x, which), rows)
    n = kept.sum()
    metrics = _measured(score, rollout) | {
        "kept/share": n / s.size,
        "kept/prompts": jnp.isfinite(value[:, 0]).mean(),
        "kept/scores": jnp.where(kept, value.reshape(-1), 0).sum() / jnp.maximum(n, 1),
    }
    return out._replace(mask=out.mask * kept[:, None]), _f32(metrics)


def first_of_its_kind(rows: Tokens):
    """bool[B,group]: no earlier answer of the group is the same, token by token."""
    t, m = rows.tokens, rows.mask
    group = t.shape[1]

    def repeats(g):
        same = ((t == t[:, g][:, None]) & (m == m[:, g][:, None])).all(-1)
        return (same & (jnp.arange(group) < g)).any(1)

    return ~jax.lax.map(repeats, jnp.arange(group)).T
