"""Group-relative policy optimisation (Shao et al. 2024, DeepSeekMath, 2402.03300) and the shape its relatives have.

There is no critic: the answers to one prompt are each other's baseline (`ops.advantage`). A relative is a token equation
and a way to average, functions of small arrays both; `policy_gradient` gives them their log-probs. params {"policy": ...}.
"""

from __future__ import annotations

from typing import Callable

import jax
import jax.numpy as jnp

from jaxalign.ops.advantage import kl_tokens
from jaxalign.ops.logprob import before, targets, token_loss
from jaxalign.ops.masked import segment_sums
from jaxalign.types import GroupExperience, Loss, Model, Objective, Term, UserError


def ratio(logp, old_logp):
    """exp(logp - old), bounded by e^20 so that a clipped one is finite."""
    return jnp.exp(jnp.minimum(logp - old_logp, 20.0))


def clipped_loss(logp, old_logp, advantages, low, high):
    """-min(r A, clip(r, 1 - low, 1 + high) A), f32[B,T] (2402.03300 eq. 3; low and high apart: DAPO, 2503.14476 eq. 10)."""
    r = ratio(logp, old_logp)
    return -jnp.minimum(r * advantages, jnp.clip(r, 1 - low, 1 + high) * advantages)


def clip_shares(logp, old_logp, advantages, low, high):
    """TRL's clip_ratio/...: where the clip takes a gradient away, f32[B,T] each."""
    r = ratio(logp, old_logp)
    below, above = (r < 1 - low) & (advantages < 0), (r > 1 + high) & (advantages > 0)
    names = {"clip_ratio/low_mean": below, "clip_ratio/high_mean": above, "clip_ratio/region_mean": below | above}
    return {k: v.astype(jnp.float32) for k, v in names.items()}


# -- averages: mask f32[B,T], segments [B,T] -> (weight of each token f32[B,T], what to divide their sum by f32[]) --------


def sequence_mean(mask, segments):
    """Mean over each answer, then over answers (2402.03300 eq. 3): a token of a short answer weighs more."""
    w = mask / jnp.maximum(segment_sums(mask, segments), 1)
    return w, w.sum()


def token_mean(mask, segments):
    """Mean over all tokens of the step (DAPO, 2503.14476, section 3.3)."""
    return mask, mask.sum()


def constant(length: int) -> Callable:
    """Sum over each answer, divided by `length` whatever its own, then the mean over answers (Dr. GRPO, 2503.20783, section 3.2)."""
    return lambda mask, segments: (mask, length * sequence_mean(mask, segments)[1])


# -- objectives -----------------------------------------------------------------------------------------------------


def policy_gradient(model: Model, equation: Callable, average: Callable, *, shares: Callable | None = None, beta: float = 0.0, temperature: float = 1.0) -> Objective:
    """An objective from `equation(logp, old, advantages) -> f32[B,T]` and an `average`, on batches of `GroupExperience`.

    beta times the k3 estimate of KL(policy || reference) is added to each token's loss; the gradient flows through it.
    `shares(logp, old, advantages)` names what the metrics are to say of the tokens. Where the batch has no old log-probs the
    policy is its own: the ratio is 1 and its gradient that of log p.
    """

    def loss(params, frozen, aux, batch: GroupExperience, key, stats) -> Loss:
        if beta and batch.ref_logp is None:
            raise UserError(f"beta {beta} asks for a KL penalty, and the batch holds no reference log-probs (rl.experience.group_experience)")
        mask = targets(batch.mask, batch.segments)
        clean = lambda x: None if x is None else jnp.where(mask > 0, x, 0.0)
        advantages, sampled, old, ref = map(clean, (batch.advantages, batch.sampled, batch.logp, batch.ref_logp))
        h = model.hidden(params["policy"], batch.tokens, batch.segments, batch.positions)
        weight, n = average(mask, batch.segments)

        def token(logp, entropy, extra):
            advantages, old, ref, weight = extra
            out = equation(logp, jax.lax.stop_gradient(logp) if old is None else old, advantages)
            return weight * (out + beta * kl_tokens(logp, ref, "k3") if beta else out)

        extra = (advantages, old, ref if beta else None, weight)
        total, out = token_loss(before(h.x, batch.segments), model.unembed(params["policy"]), batch.tokens, mask, extra, token, temperature=temperature)
        logp = jax.lax.stop_gradient(out.logp)
        mean = lambda x: jax.lax.stop_gradient(((mask * x).sum(), mask.sum()))
        metrics = {"entropy": mean(out.entropy), "sampling/sampling_logp_difference/mean": mean(jnp.abs(logp - sampled))}
        if beta:
            metrics["kl"] = mean(kl_tokens(logp, ref, "k3"))
        if shares is not None:
            metrics |= {k: mean(v) for k, v in shares(logp, logp if old is None else old, advantages).items()}
        return Loss({"policy": Term(total, n)}, metrics)

    return Objective(loss)


def _clipped(model, average, clip, clip_high, beta, temperature):
    clip_high = clip if clip_high is None else clip_high
    return policy_gradient(
        model, lambda *x: clipped_loss(*x, clip, clip_high), average, shares=lambda *x: clip_shares(*x, clip, clip_high), beta=beta, temperature=temperature
    )  # fmt: skip


def grpo(model: Model, *, clip: float = 0.2, clip_high: float | None = None, beta: float = 0.04, temperature: float = 1.0) -> Objective:
    """Clipped ratios, a KL penalty in the loss, the mean over each answer and then over answers (TRL's loss_type "grpo").
    clip_high None: as clip."""
    return _clipped(model, sequence_mean, clip, clip_high, beta, temperature)


def token_grpo(model: Model, *, clip: float = 0.2, clip_high: float | None = None, beta: float = 0.0, temperature: float = 1.0) -> Objective:
    """GRPO whose mean is over the tokens of the step (TRL's "dapo" and, in one micro-batch, "bnpo")."""
    return _clipped(model, token_mean, clip, clip_high, beta, temperature)


def dr_grpo(model: Model, *, clip: float = 0.2, clip_high: float | None = None, beta: float = 0.0, temperature: float = 1.0, max_new: int = 256) -> Objective:
    """GRPO divided by a constant, so that length is no way to a smaller loss; its advantages are centred, not scaled
    (`ops.advantage.centred_advantages`)."""
    return _clipped(model, constant(max_new), clip, clip_high, beta, temperature)
