"""Reward models from human judgement: pairs, K-rankings, the best of K, scores, the steps of an answer. Equations first, then the
objectives."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.types import Labelled, Loss, Objective, Pairs, Rankings, ScalarModel, Steps, Term


def bradley_terry(chosen, rejected, margin=0.0):
    """-log sigma(r_w - r_l - m), per pair (Llama 2, 2307.09288, eq. 2; m = 0: InstructGPT)."""
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def soft_bradley_terry(chosen, rejected, probability, margin=0.0):
    """-q log sigma(d) - (1 - q) log sigma(-d) with d = r_w - r_l - m, per pair: the labellers said with probability q that the chosen
    one is better (q = 1: `bradley_terry`). Without a margin it is least where sigma(d) = q."""
    d = chosen - rejected - margin
    return -probability * jax.nn.log_sigmoid(d) - (1 - probability) * jax.nn.log_sigmoid(-d)


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


def best_of(rewards, best, valid):
    """-log of the softmax over the K rewards at the best one (Ziegler et al. 1909.08593, eq. 1; Stiennon's PickBest labels).

    rewards f32[B,K]; best, valid f32[B,K]. -> f32[B]. Where several tie for the best, of what they have together.
    """
    share = lambda which: jax.nn.logsumexp(jnp.where(which > 0, rewards, -1e30), axis=1)  # an empty slot may hold anything
    return share(valid) - share(best * valid)


def regression(rewards, scores):
    """(r - s)^2, per answer: s is the score that people gave."""
    return (rewards - scores) ** 2


def step_loss(scores, label):
    """-y log sigma(s) - (1 - y) log sigma(-s): cross entropy of "this step is right" at the step's last token, y in [0, 1] (Lightman et
    al. 2305.20050; y soft: Math-Shepherd, 2312.08935, eq. 2)."""
    return -label * jax.nn.log_sigmoid(scores) - (1 - label) * jax.nn.log_sigmoid(-scores)


def step_ends(tokens, mask, breaks):
    """f32[B,T]: 1 at the last token of each step of an answer: where a run of line breaks ends, and at the answer's end.

    tokens i32[B,T]; mask f32[B,T], 1 on the answer; breaks bool[V]: the tokens that hold a line break. A break right before the last
    token, the stop, opens no step of its own.
    """
    ahead = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
    last = mask * (1 - ahead(mask))
    broken = mask * breaks[tokens]
    return jnp.maximum(last, broken * (1 - ahead(broken)) * (1 - ahead(last)))


# What the steps' scores say of the whole answer, a probability; scores, ends f32[B,T] -> f32[B] (Lightman et al., appendix F;
# Snell et al. 2408.03314 found "last" to rank best).
AGGREGATE = {
    "min": lambda scores, ends: jax.nn.sigmoid(jnp.where(ends > 0, scores, jnp.inf).min(1)),
    "product": lambda scores, ends: jnp.exp(jnp.where(ends > 0, jax.nn.log_sigmoid(scores), 0.0).sum(1)),
    "last": lambda scores, ends: jax.nn.sigmoid(jnp.take_along_axis(scores, (scores.shape[1] - 1 - jnp.argmax(ends[:, ::-1], 1))[:, None], 1)[:, 0]),
}


def pairs(model: ScalarModel, *, centre: float = 0.0) -> Objective:
    """Bradley-Terry on `Pairs`, soft where they bring probabilities; a pair whose completion mask is empty weighs 0. `centre` is eta
    of `centring`."""

    def loss(params, frozen, aux, batch: Pairs, key, stats) -> Loss:
        B = batch.chosen.tokens.shape[0]
        rows = jax.tree.map(lambda w, l: jnp.concatenate([w, l]), batch.chosen, batch.rejected)
        r = model.reward(params, rows.tokens, rows.segments, rows.positions)
        w, l = r[:B], r[B:]
        real = (batch.chosen.mask.any(1) & batch.rejected.mask.any(1)).astype(jnp.float32)
        n = real.sum()
        margin = jnp.where(real > 0, batch.margin, 0.0)
        each = bradley_terry(w, l, margin) if batch.probability is None else soft_bradley_terry(w, l, batch.probability, margin)
        terms = {"reward": Term((real * each).sum(), n)}
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


def best(model: ScalarModel, *, centre: float = 0.0) -> Objective:
    """`best_of` on `Rankings`, of which it reads who stands first. Prompts whose candidates all do weigh 0. `centre` is eta of
    `centring`, over the best and each other."""

    def loss(params, frozen, aux, batch: Rankings, key, stats) -> Loss:
        B, K, T = batch.candidates.tokens.shape
        rows = jax.tree.map(lambda a: a.reshape(B * K, T), batch.candidates)
        r = model.reward(params, rows.tokens, rows.segments, rows.positions).reshape(B, K)
        r = jnp.where(batch.valid > 0, r, 0.0)  # an empty slot may hold anything
        first = jnp.where(batch.valid > 0, batch.rank, jnp.iinfo(jnp.int32).max).min(1, keepdims=True)
        top = batch.valid * (batch.rank == first)
        others = batch.valid - top
        real = others.any(1).astype(jnp.float32)
        n = real.sum()
        against = top[:, :, None] * others[:, None, :]
        terms = {"reward": Term((real * best_of(r, top, jnp.maximum(batch.valid, 1 - real[:, None]))).sum(), n)}
        if centre:
            square = against * centring(r[:, :, None], r[:, None, :])
            terms["centring"] = Term((square.sum((1, 2)) / jnp.maximum(against.sum((1, 2)), 1)).sum(), n, centre)
        r = jax.lax.stop_gradient(r)
        chosen = jnp.where(batch.valid > 0, r, -jnp.inf).argmax(1)
        hit = jnp.take_along_axis(top, chosen[:, None], 1)[:, 0]
        return Loss(terms, {"best_accuracy": ((real * hit).sum(), n), **_metrics(r[:, :, None], r[:, None, :], against)})

    return Objective(loss)


def scores(model: ScalarModel) -> Objective:
    """`regression` on `Labelled`; an answer whose completion mask is empty weighs 0."""

    def loss(params, frozen, aux, batch: Labelled, key, stats) -> Loss:
        r = model.reward(params, batch.rows.tokens, batch.rows.segments, batch.rows.positions)
        real = batch.rows.mask.any(1).astype(jnp.float32)
        n, label = real.sum(), jnp.where(real > 0, batch.label, 0.0)
        still = jax.lax.stop_gradient(r)
        metrics = {"mean_absolute_error": ((real * jnp.abs(still - label)).sum(), n), "mean_reward": ((real * still).sum(), n), "mean_label": ((real * label).sum(), n)}
        return Loss({"reward": Term((real * regression(r, label)).sum(), n)}, metrics)

    return Objective(loss)


def steps(model: ScalarModel) -> Objective:
    """`step_loss` at the last token of each judged step of `Steps`, averaged over all of the step's batch. The head's output is the
    log-odds that the step is right."""

    def loss(params, frozen, aux, batch: Steps, key, stats) -> Loss:
        s = model.scores(params, batch.rows.tokens, batch.rows.segments, batch.rows.positions)
        mask = batch.rows.mask
        still, n = jax.lax.stop_gradient(s), mask.sum()
        wrong, sure = mask * (batch.label < 0.5), mask * (batch.label != 0.5)
        metrics = {
            "accuracy": ((sure * ((still > 0) == (batch.label > 0.5))).sum(), sure.sum()),
            "wrong_found": ((wrong * (still < 0)).sum(), wrong.sum()),
            "mean_reward": ((mask * still).sum(), n),
        }
        return Loss({"reward": Term((mask * step_loss(s, batch.label)).sum(), n)}, metrics)

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
