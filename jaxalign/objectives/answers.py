"""Policy gradients whose ratio belongs to an answer, not to a token: GSPO, GMPO, VESPO, and RLOO where rollouts are used again.

Equations take (logp, old_logp, advantages) f32[B,T] and `objectives.grpo.Rows`, and give every token of an answer the same
loss (VESPO: the same weight), so that with `sequence_mean` the answers weigh alike. params {"policy": ...}, batches of `GroupExperience`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.objectives.grpo import Rows, answer_gradient, pessimistic, policy_gradient, ratio, reinforce_loss, sequence_mean, sequence_sum, share_names, token_mean
from jaxalign.ops.masked import segment_sums
from jaxalign.types import Loss, Model, Objective, UserError


def answer_sum(x, rows: Rows):
    """At each token the sum of x over the tokens of its answer, f32[B,T]."""
    return segment_sums(jnp.where(rows.mask > 0, x, 0.0), rows.segments)


def answer_mean(x, rows: Rows):
    return answer_sum(x, rows) / jnp.maximum(segment_sums(rows.mask, rows.segments), 1)


def gspo_loss(logp, old_logp, advantages, rows: Rows, low, high):
    """-min(s A, clip(s, 1 - low, 1 + high) A) with s = exp(mean of log p - log p_old over the answer) (GSPO, 2507.18071, eq. 5, 7)."""
    return pessimistic(ratio(answer_mean(logp - old_logp, rows), 0.0), advantages, low, high)


def gspo_token_loss(logp, old_logp, advantages, rows: Rows, low, high):
    """`gspo_loss` with s_t = sg[s] p / sg[p] (2507.18071, eq. 13, 14): the same value and, where all tokens of an answer have one
    advantage, the same gradient; but advantages may differ from token to token."""
    s = jax.lax.stop_gradient(ratio(answer_mean(logp - old_logp, rows), 0.0))
    return pessimistic(s * jnp.exp(logp - jax.lax.stop_gradient(logp)), advantages, low, high)


def gmpo_loss(logp, old_logp, advantages, rows: Rows, low, high):
    """-A exp(mean of the clipped log-ratios) (GMPO, 2507.20673, eq. 4): the geometric mean of the tokens' ratios, each clipped to
    [e^-low, e^high] on the side on which the answer's A pushes, also at tokens that have none (`rl.top_entropy`); one outlier does not
    move it as it does the arithmetic mean."""
    d = logp - old_logp
    d = jnp.where(answer_sum(advantages, rows) > 0, jnp.minimum(d, high), jnp.maximum(d, -low))
    return -ratio(answer_mean(d, rows), 0.0) * advantages


def vespo_weight(log_w, advantages, k_pos, lambda_pos, k_neg, lambda_neg):
    """W^k e^(lambda (1 - W)) of the ratio W = e^log_w of an answer, with a k and a lambda for A >= 0 and for A < 0 (VESPO, 2602.10693): 1 at
    W = 1, largest at k / lambda, and 0 far away on both sides."""
    good = advantages >= 0
    k, lam = jnp.where(good, k_pos, k_neg), jnp.where(good, lambda_pos, lambda_neg)
    log_w = jnp.minimum(log_w, 20.0)
    return jnp.exp(lam + k * log_w - lam * jnp.exp(log_w))


def vespo_loss(logp, old_logp, advantages, rows: Rows, *shape):
    """-sg[`vespo_weight`] A log p with W = p(answer) / p_old(answer), the product of all its tokens' ratios and no root of it."""
    weight = vespo_weight(answer_sum(logp - old_logp, rows), advantages, *shape)
    return -jax.lax.stop_gradient(weight) * advantages * logp


def rloo_loss(logp, old_logp, advantages, rows: Rows, low, high):
    """-min(rho A, clip(rho) A) with rho = p(answer) / p_old(answer), the product of all its tokens' ratios (TRL's RLOO)."""
    return pessimistic(ratio(answer_sum(logp - old_logp, rows), 0.0), advantages, low, high)


def _answers_clipped(logp, advantages, rows: Rows, log_ratio, low, high):
    """TRL's clip_ratio/... of ratios of answers: shares of the answers."""
    r = ratio(log_ratio, 0.0)
    weight, n = sequence_mean(rows.mask, rows.segments)
    return {k: ((weight * v).sum(), n) for k, v in share_names((r < 1 - low) & (advantages < 0), (r > 1 + high) & (advantages > 0)).items()}


def gspo(model: Model, *, clip: float = 3e-4, clip_high: float | None = 4e-4, beta: float = 0.0, kl: str = "k3", entropy_coef: float = 0.0, temperature: float = 1.0) -> Objective:
    """`gspo_loss`, the mean over answers. Clips are those of a mean log-ratio, hence so small. clip_high None: as clip."""
    return _gspo(gspo_loss, model, clip, clip_high, beta=beta, kl=kl, entropy_coef=entropy_coef, temperature=temperature)


def gspo_token(model: Model, *, clip: float = 3e-4, clip_high: float | None = 4e-4, beta: float = 0.0, kl: str = "k3", entropy_coef: float = 0.0, temperature: float = 1.0) -> Objective:
    """`gspo_token_loss`, the mean over answers."""
    return _gspo(gspo_token_loss, model, clip, clip_high, beta=beta, kl=kl, entropy_coef=entropy_coef, temperature=temperature)


def _gspo(equation, model, clip, clip_high, **more):
    high = clip if clip_high is None else clip_high
    shares = lambda logp, old, advantages, rows: _answers_clipped(logp, advantages, rows, answer_mean(logp - old, rows), clip, high)
    return answer_gradient(model, lambda *x: equation(*x, clip, high), sequence_mean, shares=shares, **more)


def gmpo(model: Model, *, clip: float = 0.4, clip_high: float | None = None, beta: float = 0.0, kl: str = "k3", entropy_coef: float = 0.0, temperature: float = 1.0) -> Objective:
    """`gmpo_loss`, the mean over answers; clips are of log-ratios. clip_high None: as clip."""
    high = clip if clip_high is None else clip_high

    def shares(logp, old, advantages, rows: Rows):
        d = logp - old
        said = share_names((d < -clip) & (advantages < 0), (d > high) & (advantages > 0))
        return {k: ((rows.mask * v).sum(), rows.mask.sum()) for k, v in said.items()}

    more = dict(beta=beta, kl=kl, entropy_coef=entropy_coef, temperature=temperature)
    return answer_gradient(model, lambda *x: gmpo_loss(*x, clip, high), sequence_mean, shares=shares, **more)


def vespo(
    model: Model, *, k_pos: float = 2.0, lambda_pos: float = 3.0, k_neg: float = 3.0, lambda_neg: float = 2.0, beta: float = 0.0, kl: str = "k3",
    entropy_coef: float = 0.0, temperature: float = 1.0,
) -> Objective:  # fmt: skip
    """`vespo_loss`, the mean over the tokens of the step."""
    if min(k_pos, k_neg) < 0 or min(lambda_pos, lambda_neg) <= 0:
        raise UserError(f"objective.k_pos {k_pos} and k_neg {k_neg} must not be below 0, lambda_pos {lambda_pos} and lambda_neg {lambda_neg} must be above it: else far ratios weigh most")
    shape = k_pos, lambda_pos, k_neg, lambda_neg

    def shares(logp, old, advantages, rows: Rows):
        weight, n = sequence_mean(rows.mask, rows.segments)
        return {"vespo/phi_seq_mean": ((weight * vespo_weight(answer_sum(logp - old, rows), advantages, *shape)).sum(), n)}

    more = dict(beta=beta, kl=kl, entropy_coef=entropy_coef, temperature=temperature)
    return answer_gradient(model, lambda *x: vespo_loss(*x, *shape), token_mean, shares=shares, **more)


def rloo(model: Model, *, clip: float = 0.2, clip_high: float | None = None, temperature: float = 1.0) -> Objective:
    """REINFORCE with a leave-one-out baseline (2402.14740; `ops.advantage.leave_one_out_advantages`): -A times the log-prob of the
    whole answer, the mean over answers. Where rollouts are used again (the batch has old log-probs) it is `rloo_loss`."""
    high = clip if clip_high is None else clip_high
    once = policy_gradient(model, reinforce_loss, sequence_sum, temperature=temperature)
    shares = lambda logp, old, advantages, rows: _answers_clipped(logp, advantages, rows, answer_sum(logp - old, rows), clip, high)
    again = answer_gradient(model, lambda *x: rloo_loss(*x, clip, high), sequence_mean, shares=shares, temperature=temperature)

    def loss(params, frozen, aux, batch, key, stats) -> Loss:
        return (once if batch.logp is None else again).loss(params, frozen, aux, batch, key, stats)

    return Objective(loss)
