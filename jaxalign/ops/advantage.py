"""Per-token rewards, generalised advantage estimation (index t speaks of token t) and group-relative advantages."""

from __future__ import annotations

import jax
import jax.numpy as jnp


# of d = logp - ref_logp
KL_ESTIMATORS = {
    "k1": lambda d: d,
    "k2": lambda d: 0.5 * d * d,
    "k3": lambda d: jnp.expm1(-d) + d,
    "abs": jnp.abs,
}


def kl_tokens(logp, ref_logp, kind: str = "k1"):
    """Estimators of KL(policy || reference) on sampled tokens, f32[B,T] (Schulman 2020, "Approximating KL divergence").

    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, abs = |d| with d = logp - ref_logp.
    """
    return KL_ESTIMATORS[kind](logp - ref_logp)


def full_kl(logps, ref_logps):
    """KL(policy || reference) from both whole distributions, log-probs f32[...,V] -> f32[...]: no estimate."""
    return (jnp.exp(logps) * (logps - ref_logps)).sum(-1)


def overlong_penalty(length, max_new: int, buffer: int):
    """0 up to max_new - buffer tokens, then down in a line to -1 at max_new, -1 beyond; f32 like length (DAPO, 2503.14476, eq. 13)."""
    return jnp.clip((max_new - buffer - length) / buffer, -1.0, 0.0)


def at_last(score, mask):
    """[t is the last valid token] * score. score f32[B]; mask f32[B,T] -> f32[B,T]."""
    last = (mask > 0) & (jnp.cumsum(mask, -1) == mask.sum(-1, keepdims=True))
    return jnp.where(last, score[:, None], 0.0)


def token_rewards(score, kl, mask, beta):
    """reward_t = -beta * kl_t + [t is the last valid token] * score. score f32[B]; kl, mask f32[B,T] -> f32[B,T]."""
    return -beta * kl * mask + at_last(score, mask)


def gae(rewards, values, mask, gamma: float = 1.0, lam: float = 0.95):
    """(advantages, returns), f32[B,T], raw; 0 outside mask (Schulman et al. 2015, 1506.02438, eq. 16).

    delta_t = r_t + gamma V_next - V_t;  A_t = delta_t + gamma lam A_next, where "next" is the next valid token (masks
    may have gaps, as in multi-turn data) and the value after the last one is 0.
    """
    rewards, values = rewards * mask, values * mask

    def back(carry, x):
        next_value, next_adv = carry
        r, v, m = x
        adv = r + gamma * next_value - v + gamma * lam * next_adv
        keep = lambda new, old: jnp.where(m > 0, new, old)
        return (keep(v, next_value), keep(adv, next_adv)), jnp.where(m > 0, adv, 0.0)

    zero = jnp.zeros_like(values[:, 0])
    _, adv = jax.lax.scan(back, (zero, zero), (rewards.T, values.T, mask.T), reverse=True)
    adv = adv.T
    return adv, (adv + values) * mask


# -- a group of answers to one prompt is its own baseline -----------------------------------------------------------
# rewards f32[B], where G consecutive rows answer one prompt -> f32[B]. NaN is no reward: it enters no statistic, and its
# advantage is 0; so is that of a group whose rewards are all equal.


def _moments(r, axis):
    """(mean, unbiased standard deviation) over what is not NaN; the deviation of a single one is 0."""
    ok = ~jnp.isnan(r)
    n = ok.sum(axis, keepdims=True)
    mean = jnp.where(ok, r, 0).sum(axis, keepdims=True) / jnp.maximum(n, 1)
    square = jnp.where(ok, r - mean, 0) ** 2
    return mean, jnp.sqrt(square.sum(axis, keepdims=True) / jnp.maximum(n - 1, 1))


def constant_groups(rewards, group: int):
    """bool[B / G]: the groups that say nothing, because all their rewards are equal."""
    r = rewards.reshape(-1, group)
    return ~(jnp.nanmax(r, 1) > jnp.nanmin(r, 1))


def _relative(rewards, group, scale):
    r = rewards.reshape(-1, group)
    a = (r - _moments(r, 1)[0]) / scale(r)
    # A mean of equal numbers may be off by a rounding, which a deviation of 0 + 1e-4 would make 1e4 times as large.
    return jnp.where(jnp.isnan(r) | constant_groups(rewards, group)[:, None], 0.0, a).reshape(-1)


def group_advantages(rewards, group: int):
    """(R - mean) / (std + 1e-4) within the group (DeepSeekMath, 2402.03300, section 4.1; the unbiased std of TRL)."""
    return _relative(rewards, group, lambda r: _moments(r, 1)[1] + 1e-4)


def batch_advantages(rewards, group: int):
    """(R - mean of the group) / (std over the whole batch + 1e-4) (2508.08221)."""
    return _relative(rewards, group, lambda r: _moments(r, None)[1] + 1e-4)


def centred_advantages(rewards, group: int):
    """R - mean of the group (Dr. GRPO, 2503.20783)."""
    return _relative(rewards, group, lambda r: 1.0)


def leave_one_out_advantages(rewards, group: int):
    """R - mean of the others of the group (RLOO, 2402.14740, section 3): n / (n - 1) times the centred reward, n of them scored."""
    r = rewards.reshape(-1, group)
    n = (~jnp.isnan(r)).sum(1, keepdims=True)
    return (n / jnp.maximum(n - 1, 1) * centred_advantages(rewards, group).reshape(-1, group)).reshape(-1)


def _standardised(a, ok):
    """(a - mean) / (std + 1e-4) over what is ok; 0 elsewhere."""
    mean, std = _moments(jnp.where(ok, a, jnp.nan), None)
    return jnp.where(ok, (a - mean) / (std + 1e-4), 0.0).reshape(-1)


def whitened_leave_one_out_advantages(rewards, group: int):
    """`leave_one_out_advantages`, standardised over the batch (TRL's normalize_advantages). Who is alone in being scored has no
    baseline and does not count."""
    ok = ~jnp.isnan(rewards.reshape(-1, group))
    return _standardised(leave_one_out_advantages(rewards, group), (ok & (ok.sum(1, keepdims=True) > 1)).reshape(-1))


def summed_rewards(rewards, weights=()):
    """Rewards of several functions f32[B,K] -> sum_k w_k R_k f32[B], without what is NaN; NaN where all are. f32[B] stays."""
    if rewards.ndim == 1:
        return rewards
    w = jnp.asarray(weights or (1.0,) * rewards.shape[1], jnp.float32)
    return jnp.where(jnp.isnan(rewards).all(1), jnp.nan, jnp.nansum(rewards * w, 1))


def gdpo_advantages(rewards, group: int, weights=()):
    """Each of K rewards f32[B,K] standardised within its group, their weighted sum, standardised over the batch (GDPO,
    2601.05242): a reward of small variance is not drowned by one of large variance."""
    each = jax.vmap(lambda r: jnp.where(jnp.isnan(r), jnp.nan, group_advantages(r, group)), 1, 1)(rewards)
    total = summed_rewards(each, weights)
    return _standardised(total, ~jnp.isnan(total))


GROUP_ADVANTAGES = {
    "group": group_advantages,
    "batch": batch_advantages,
    "none": centred_advantages,
    "rloo": leave_one_out_advantages,
    "rloo_batch": whitened_leave_one_out_advantages,
}
SEVERAL = {"gdpo": gdpo_advantages}  # of rewards f32[B,K]
