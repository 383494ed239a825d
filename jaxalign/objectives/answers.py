"""Policy gradients whose ratio belongs to an answer, not to a token: GSPO, GMPO, and RLOO where rollouts are used again.

Equations take (logp, old_logp, advantages) f32[B,T] and `objectives.grpo.Rows`, and give every token of an answer the same
loss, so that with `sequence_mean` the answers weigh alike. params {"policy": ...}, batches of `GroupExperience`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.objectives.grpo import Rows, answer_gradient, pessimistic, policy_gradient, ratio, reinforce_loss, sequence_mean, sequence_sum, share_names
from jaxalign.ops.masked import segment_sums
from jaxalign.types import Loss, Model, Objective


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
    [e^-low, e^high] on the side on which A pushes; one outlier does not move it as it does the arithmetic mean."""
    d = logp - old_logp
    d = jnp.where(advantages > 0, jnp.minimum(d, high), jnp.maximum(d, -low))
    return -ratio(answer_mean(d, rows), 0.0) * advantages


def rloo_loss(logp, old_logp, advantages, rows: Rows, low, high):
    """-min(rho A, clip(rho) A) with rho = p(answer) / p_old(answer), the product of all its tokens' ratios (TRL's RLOO)."""
    return pessimistic(ratio(answer_sum(logp - old_logp, rows), 0.0), advantages, low, high)


def _answers_clipped(logp, advantages, rows: Rows, log_ratio, low, high):
    """TRL's clip_ratio/... of ratios of answers: shares of the answers."""
    r = ratio(log_ratio, 0.0)
    weight, n = sequence_mean(rows.mask, rows.segments)
    return {k: ((weight * v).sum(), n) for k, v in share_names((r < 1 - low) & (advantages < 0), (r > 1 + high) & (advantages > 0)).items()}


def gspo(model: Model, *, clip: float = 3e-4, clip_high: float | None = 4e-4, beta: float = 0.0, kl: str = "k3", temperature: float = 1.0) -> Objective:
    """`gspo_loss`, the mean over answers. Clips are those of a mean log-ratio, hence so small. clip_high None: as clip."""
    return _gspo(gspo_loss, model, clip, clip_high, beta, kl, temperature)


def gspo_token(model: Model, *, clip: float = 3e-4, clip_high: float | None = 4e-4, beta: float = 0.0, kl: str = "k3", temperature: float = 1.0) -> Objective:
    """`gspo_token_loss`, the mean over answers."""
    return _gspo(gspo_token_loss, model, clip, clip_high, beta, kl, temperature)


def _gspo(equation, model, clip, clip_high, beta, kl, temperature):
    high = clip if clip_high is None else clip_high
    shares = lambda logp, old, advantages, rows: _answers_clipped(logp, advantages, rows, answer_mean(logp - old, rows), clip, high)
    return answer_gradient(model, lambda *x: equation(*x, clip, high), sequence_mean, shares=shares, beta=beta, kl=kl, temperature=temperature)


def gmpo(model: Model, *, clip: float = 0.4, clip_high: float | None = None, beta: float = 0.0, kl: str = "k3", temperature: float = 1.0) -> Objective:
    """`gmpo_loss`, the mean over answers; clips are of log-ratios. clip_high None: as clip."""
    high = clip if clip_high is None else clip_high

    def shares(logp, old, advantages, rows: Rows):
        d = logp - old
        said = share_names((d < -clip) & (advantages < 0), (d > high) & (advantages > 0))
        return {k: ((rows.mask * v).sum(), rows.mask.sum()) for k, v in said.items()}

    return answer_gradient(model, lambda *x: gmpo_loss(*x, clip, high), sequence_mean, shares=shares, beta=beta, kl=kl, temperature=temperature)


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
