"""Per-token rewards and generalised advantage estimation, in the index-t-is-token-t convention."""

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


def token_rewards(score, kl, mask, beta):
    """reward_t = -beta * kl_t + [t is the last valid token] * score. score f32[B]; kl, mask f32[B,T] -> f32[B,T]."""
    last = mask * (jnp.cumsum(mask, -1) == mask.sum(-1, keepdims=True))
    return -beta * kl * mask + last * score[:, None]


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
