"""Group-relative policy optimisation (Shao et al. 2024, DeepSeekMath, 2402.03300) and its relatives, token by token.

There is no critic: the answers to one prompt are each other's baseline (`ops.advantage`). A relative is a token equation
and a way to average, functions of small arrays both; `policy_gradient` gives them their log-probs. What looks at an answer
as a whole (a ratio of sequences) is in `objectives.answers`. params {"policy": ...}.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.ops.advantage import KL_ESTIMATORS, kl_tokens
from jaxalign.ops.logprob import LogProbs, before, logprob, targets, token_loss
from jaxalign.ops.masked import segment_sums
from jaxalign.types import Array, GroupExperience, Loss, Model, Objective, Term, UserError


def ratio(logp, old_logp):
    """exp(logp - old), bounded by e^20 so that a clipped one is finite."""
    return jnp.exp(jnp.minimum(logp - old_logp, 20.0))


# -- token equations: (logp, old_logp, advantages, ...) f32[B,T] -> f32[B,T] ----------------------------------------


def pessimistic(r, advantages, low, high):
    """-min(r A, clip(r, 1 - low, 1 + high) A) of any ratio r: of a token, or of an answer."""
    return -jnp.minimum(r * advantages, jnp.clip(r, 1 - low, 1 + high) * advantages)


def clipped_loss(logp, old_logp, advantages, low, high):
    """-min(r A, clip(r, 1 - low, 1 + high) A), f32[B,T] (2402.03300 eq. 3; low and high apart: DAPO, 2503.14476 eq. 10)."""
    return pessimistic(ratio(logp, old_logp), advantages, low, high)


def two_sided_loss(logp, old_logp, advantages, low, high, delta):
    """-min(min(r, delta) A, clip(r, 1 - low, 1 + high) A) with delta > 1 + high (INTELLECT-2, 2505.07291, section 3.4): the plain
    clip leaves r unbounded where A < 0, and one token of a large ratio can undo a policy."""
    r = ratio(logp, old_logp)
    return -jnp.minimum(jnp.minimum(r, delta) * advantages, jnp.clip(r, 1 - low, 1 + high) * advantages)


def cispo_loss(logp, old_logp, advantages, cap):
    """-sg[min(r, cap)] A log p (CISPO, MiniMax-M1, 2506.13585, eq. 4): the weight is clipped, no token loses its gradient.
    cap is absolute: 1 + eps_high of the paper, epsilon_high itself in TRL."""
    return -jax.lax.stop_gradient(jnp.minimum(ratio(logp, old_logp), cap)) * advantages * logp


def sapo_loss(logp, old_logp, advantages, tau_pos, tau_neg):
    """-4/tau sigmoid(tau (r - 1)) A, tau_pos where A > 0 and tau_neg elsewhere (SAPO, 2511.20347): a soft clip. Its slope in r is A at
    r = 1, whatever tau is, and fades as r leaves 1 on either side."""
    tau = jnp.where(advantages > 0, tau_pos, tau_neg)
    return -4 / tau * jax.nn.sigmoid(tau * (ratio(logp, old_logp) - 1)) * advantages


def reinforce_loss(logp, old_logp, advantages):
    """-A log p (Williams 1992)."""
    return -advantages * logp


def clip_shares(logp, old_logp, advantages, low, high):
    """TRL's clip_ratio/...: where the clip takes a gradient away, f32[B,T] each."""
    r = ratio(logp, old_logp)
    return share_names((r < 1 - low) & (advantages < 0), (r > 1 + high) & (advantages > 0))


def share_names(below, above):
    names = {"clip_ratio/low_mean": below, "clip_ratio/high_mean": above, "clip_ratio/region_mean": below | above}
    return {k: v.astype(jnp.float32) for k, v in names.items()}


def cispo_shares(logp, old_logp, advantages, cap):
    """TRL's cispo_clip_ratio: where a weight of something good is capped."""
    return {"cispo_clip_ratio": ((ratio(logp, old_logp) > cap) & (advantages > 0)).astype(jnp.float32)}


# -- KL penalties of a token, for the loss: (logp, ref_logp, old_logp) -> f32[B,T] ----------------------------------
# Their gradients differ more than their values: on policy that of k1 is 0 in expectation, that of k2 is the gradient of
# KL(policy || reference), that of k3 of KL(reference || policy). Times the ratio k3 is right off policy too, in value and
# gradient (DeepSeek-V3.2, 2512.02556, section 3.1).

KL_LOSSES: dict[str, Callable] = {k: lambda logp, ref, old, k=k: kl_tokens(logp, ref, k) for k in KL_ESTIMATORS}
KL_LOSSES["k3_corrected"] = lambda logp, ref, old: ratio(logp, old) * kl_tokens(logp, ref, "k3")


def kl_loss(kind: str) -> Callable:
    if kind not in KL_LOSSES:
        raise UserError(f"objective.kl {kind!r} is unknown; it is one of {', '.join(KL_LOSSES)}")
    return KL_LOSSES[kind]


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


sequence_sum = constant(1)  # sum over each answer, then the mean over answers: the gradient of an expected reward


# -- objectives -----------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """A `GroupExperience` as the equations read it: f32[B,T], 0 outside mask."""

    mask: Array
    segments: Array
    advantages: Array
    sampled: Array
    old: Array | None
    ref: Array | None


def read(model: Model, params, batch: GroupExperience, beta: float):
    """(Rows, hidden states before each token f[B,T,D]). Raises UserError for a penalty without a reference."""
    if beta and batch.ref_logp is None:
        raise UserError(f"beta {beta} asks for a KL penalty, and the batch holds no reference log-probs (rl.experience.group_experience)")
    mask = targets(batch.mask, batch.segments)
    clean = lambda x: None if x is None else jnp.where(mask > 0, x, 0.0)
    h = model.hidden(params["policy"], batch.tokens, batch.segments, batch.positions)
    return Rows(mask, batch.segments, *map(clean, (batch.advantages, batch.sampled, batch.logp, batch.ref_logp))), before(h.x, batch.segments)


def stated(rows: Rows, out: LogProbs, kl: Callable | None) -> dict:
    """The metrics that all of them have."""
    logp = jax.lax.stop_gradient(out.logp)
    mean = lambda x: jax.lax.stop_gradient(((rows.mask * x).sum(), rows.mask.sum()))
    metrics = {"entropy": mean(out.entropy), "sampling/sampling_logp_difference/mean": mean(jnp.abs(logp - rows.sampled))}
    return metrics if kl is None else metrics | {"kl": mean(kl(logp, rows.ref, logp if rows.old is None else rows.old))}


def per_token(average: Callable) -> Callable:
    """Objective.stats: what `average` divides by, for each token of the whole step. An entropy bonus is a mean over tokens whatever the
    policy's loss is a mean over, so that its coefficient means the same everywhere, and this is what it is scaled by to share the
    policy's sum (whose logits are then computed once)."""

    def stats(params, frozen, aux, batch: GroupExperience):
        mask = targets(batch.mask, batch.segments)
        return {"per_token": (average(mask, batch.segments)[1], mask.sum())}

    return stats


def policy_gradient(
    model: Model, equation: Callable, average: Callable, *, shares: Callable | None = None, beta: float = 0.0, kl: str = "k3", entropy_coef: float = 0.0,
    temperature: float = 1.0,
) -> Objective:  # fmt: skip
    """An objective from `equation(logp, old, advantages) -> f32[B,T]` and an `average`, on batches of `GroupExperience`.

    beta times an estimate of KL(policy || reference), a key of KL_LOSSES, is added to each token's loss; the gradient flows
    through it. entropy_coef times the mean entropy of a token is taken off the loss. `shares(logp, old, advantages)` names what
    the metrics are to say of the tokens. Where the batch has no old log-probs the policy is its own: the ratio is 1 and its
    gradient that of log p.
    """
    penalty = kl_loss(kl) if beta else None

    def loss(params, frozen, aux, batch: GroupExperience, key, stats) -> Loss:
        rows, x = read(model, params, batch, beta)
        weight, n = average(rows.mask, rows.segments)

        def token(logp, entropy, extra):
            advantages, old, ref, weight, bonus = extra
            old = jax.lax.stop_gradient(logp) if old is None else old
            out = equation(logp, old, advantages)
            out = weight * (out + beta * penalty(logp, ref, old) if beta else out)
            return out if bonus is None else out - bonus * entropy

        bonus = entropy_coef * stats["per_token"] * rows.mask if entropy_coef else None
        extra = (rows.advantages, rows.old, rows.ref if beta else None, weight, bonus)
        total, out = token_loss(x, model.unembed(params["policy"]), batch.tokens, rows.mask, extra, token, entropy=bool(entropy_coef), temperature=temperature)
        metrics = stated(rows, out, penalty)
        if shares is not None:
            said = shares(out.logp, out.logp if rows.old is None else rows.old, rows.advantages)
            metrics |= {k: jax.lax.stop_gradient(((rows.mask * v).sum(), rows.mask.sum())) for k, v in said.items()}
        return Loss({"policy": Term(total, n)}, metrics)

    return Objective(loss, stats=per_token(average) if entropy_coef else None)


def answer_gradient(
    model: Model, equation: Callable, average: Callable, *, shares: Callable | None = None, beta: float = 0.0, kl: str = "k3", entropy_coef: float = 0.0,
    temperature: float = 1.0,
) -> Objective:  # fmt: skip
    """As `policy_gradient`, for what sees whole answers: equation(logp, old, advantages, rows) -> f32[B,T], rows being `Rows`.

    Ratios of answers need all log-probs before the first gradient, so logits are computed twice. `shares(logp, old, advantages,
    rows)` -> {name: (total, weight)}.
    """
    penalty = kl_loss(kl) if beta else None

    def loss(params, frozen, aux, batch: GroupExperience, key, stats) -> Loss:
        rows, x = read(model, params, batch, beta)
        weight, n = average(rows.mask, rows.segments)
        out = logprob(x, model.unembed(params["policy"]), batch.tokens, rows.mask, temperature=temperature)
        old = jax.lax.stop_gradient(out.logp) if rows.old is None else rows.old
        each = equation(out.logp, old, rows.advantages, rows)
        if beta:
            each = each + beta * penalty(out.logp, rows.ref, old)
        total = jnp.where(rows.mask > 0, weight * each, 0.0).sum()
        if entropy_coef:
            total = total - entropy_coef * stats["per_token"] * (rows.mask * out.entropy).sum()
        metrics = stated(rows, out, penalty)
        if shares is not None:
            metrics |= jax.lax.stop_gradient(shares(out.logp, old, rows.advantages, rows))
        return Loss({"policy": Term(total, n)}, metrics)

    return Objective(loss, stats=per_token(average) if entropy_coef else None)


def in_policy(logp, advantages, rows: Rows, delta):
    """f32[B,T]: 0 on answers of negative advantage that the policy has left, mean(log p_sampler - log p) > delta (the off-policy
    sequence mask of DeepSeek-V3.2, 2512.02556, eq. 9): what is unlikely by now need not be pushed further away."""
    gap = segment_sums(jax.lax.stop_gradient(rows.sampled - logp) * rows.mask, rows.segments) / jnp.maximum(segment_sums(rows.mask, rows.segments), 1)
    return ((advantages >= 0) | (gap <= delta)).astype(jnp.float32)


def kept(equation: Callable, delta: float) -> Callable:
    """A token equation without the answers that `in_policy` drops."""
    return lambda logp, old, advantages, rows: equation(logp, old, advantages) * in_policy(logp, advantages, rows, delta)


def _clipped(model, average, clip, clip_high, delta, off_policy, **more):
    high = clip if clip_high is None else clip_high
    if delta is not None and delta <= 1 + high:
        raise UserError(f"objective.delta {delta} must be above 1 + the upper clip, {1 + high:g}: it bounds the ratios that the clip leaves alone")
    equation = (lambda *x: clipped_loss(*x, clip, high)) if delta is None else (lambda *x: two_sided_loss(*x, clip, high, delta))
    shares = lambda *x: clip_shares(*x, clip, high)
    if off_policy is None:
        return policy_gradient(model, equation, average, shares=shares, **more)
    tokens = lambda *x: {k: ((x[-1].mask * v).sum(), x[-1].mask.sum()) for k, v in shares(*x[:3]).items()}
    return answer_gradient(model, kept(equation, off_policy), average, shares=tokens, **more)


def grpo(
    model: Model, *, clip: float = 0.2, clip_high: float | None = None, delta: float | None = None, off_policy: float | None = None,
    beta: float = 0.04, kl: str = "k3", entropy_coef: float = 0.0, temperature: float = 1.0,
) -> Objective:  # fmt: skip
    """Clipped ratios, a KL penalty in the loss, the mean over each answer and then over answers (TRL's loss_type "grpo").

    clip_high None: as clip. delta: `two_sided_loss`. off_policy: `in_policy`, at most so many nats per token. kl: of KL_LOSSES.
    entropy_coef: of a bonus, `policy_gradient`.
    """
    return _clipped(model, sequence_mean, clip, clip_high, delta, off_policy, beta=beta, kl=kl, entropy_coef=entropy_coef, temperature=temperature)


def token_grpo(
    model: Model, *, clip: float = 0.2, clip_high: float | None = None, delta: float | None = None, off_policy: float | None = None,
    beta: float = 0.0, kl: str = "k3", entropy_coef: float = 0.0, temperature: float = 1.0,
) -> Objective:  # fmt: skip
    """GRPO whose mean is over the tokens of the step (TRL's "dapo" and, in one micro-batch, "bnpo")."""
    return _clipped(model, token_mean, clip, clip_high, delta, off_policy, beta=beta, kl=kl, entropy_coef=entropy_coef, temperature=temperature)


def dapo(
    model: Model, *, clip: float = 0.2, clip_high: float | None = 0.28, delta: float | None = None, off_policy: float | None = None,
    beta: float = 0.0, kl: str = "k3", entropy_coef: float = 0.0, temperature: float = 1.0,
) -> Objective:  # fmt: skip
    """`token_grpo` that clips higher above than below (2503.14476). Its other two parts are of the rollout: dynamic sampling
    (`rl.online.OnlineSource`) and what becomes of answers that are too long (`rl.experience.group_experience`)."""
    return token_grpo(model, clip=clip, clip_high=clip_high, delta=delta, off_policy=off_policy, beta=beta, kl=kl, entropy_coef=entropy_coef, temperature=temperature)


def dr_grpo(
    model: Model, *, clip: float = 0.2, clip_high: float | None = None, delta: float | None = None, off_policy: float | None = None,
    beta: float = 0.0, kl: str = "k3", entropy_coef: float = 0.0, temperature: float = 1.0, max_new: int = 256,
) -> Objective:  # fmt: skip
    """GRPO divided by a constant, so that length is no way to a smaller loss; its advantages are centred, not scaled
    (`ops.advantage.centred_advantages`)."""
    return _clipped(model, constant(max_new), clip, clip_high, delta, off_policy, beta=beta, kl=kl, entropy_coef=entropy_coef, temperature=temperature)


def cispo(model: Model, *, cap: float = 5.0, beta: float = 0.0, kl: str = "k3", entropy_coef: float = 0.0, temperature: float = 1.0) -> Objective:
    """`cispo_loss`, the mean over the tokens of the step."""
    more = dict(beta=beta, kl=kl, entropy_coef=entropy_coef, temperature=temperature)
    return policy_gradient(model, lambda *x: cispo_loss(*x, cap), token_mean, shares=lambda *x: cispo_shares(*x, cap), **more)


def sapo(
    model: Model, *, tau_pos: float = 1.0, tau_neg: float = 1.05, beta: float = 0.0, kl: str = "k3", entropy_coef: float = 0.0, temperature: float = 1.0,
) -> Objective:  # fmt: skip
    """`sapo_loss`, the mean over each answer and then over answers."""
    if min(tau_pos, tau_neg) <= 0:
        raise UserError(f"objective.tau_pos {tau_pos} and objective.tau_neg {tau_neg} must be above 0: they say how soon a ratio that leaves 1 is not followed")
    return policy_gradient(model, lambda *x: sapo_loss(*x, tau_pos, tau_neg), sequence_mean, beta=beta, kl=kl, entropy_coef=entropy_coef, temperature=temperature)


def remax(model: Model, *, temperature: float = 1.0) -> Objective:
    """`reinforce_loss` summed over each answer, without a clip; its advantages are `rl.reinforce.remax_experience`'s (2310.10505)."""
    return policy_gradient(model, reinforce_loss, sequence_sum, temperature=temperature)


def reinforce_pp(model: Model, *, clip: float = 0.2, clip_high: float | None = None, temperature: float = 1.0) -> Objective:
    """PPO's clip on advantages that know the token (`rl.reinforce.reinforce_experience`), the mean over the tokens of the step
    (REINFORCE++, 2501.03262)."""
    return _clipped(model, token_mean, clip, clip_high, None, None, temperature=temperature)
