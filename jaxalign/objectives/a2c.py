"""Advantage actor-critic (Mnih et al. 2016, 1602.01783) on `Experience`, in the form of Stable-Baselines3, which RL4LMs trains with.

params are {"policy": ..., "value": ...} as PPO's; a rollout is used once, so there is no old policy and nothing to clip.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.objectives.ppo import states_and_values
from jaxalign.ops.logprob import targets, token_loss
from jaxalign.types import Experience, Loss, Model, Objective, ScalarModel, Term


def value_loss(values, returns):
    """(V - R)^2, f32[B,T]: no clip and no half."""
    return (values - returns) ** 2


def a2c(model: Model, value: ScalarModel | None = None, *, value_coef: float = 0.5, entropy_coef: float = 0.0, temperature: float = 1.0) -> Objective:
    """-A log p - entropy_coef H + value_coef (V - R)^2, means over the tokens of the step. value=None: the critic is a head on the
    policy. Whether advantages are whitened is `rl.experience.make_experience`'s to say."""

    def loss(params, frozen, aux, exp: Experience, key, stats) -> Loss:
        mask = targets(exp.mask, exp.segments)
        exp = exp._replace(**{k: jnp.where(mask > 0, getattr(exp, k), 0.0) for k in ("logp", "advantages", "returns")})
        x, values = states_and_values(model, value, params, exp)

        def actor(logp, entropy, advantages):
            return -advantages * logp - (entropy_coef * entropy if entropy_coef else 0.0)

        total, out = token_loss(x, model.unembed(params["policy"]), exp.tokens, mask, exp.advantages, actor, entropy=bool(entropy_coef), temperature=temperature)
        vf = value_loss(values, exp.returns)
        mean = lambda x: jax.lax.stop_gradient(((mask * x).sum(), mask.sum()))
        metrics = {
            "policy/entropy_avg": mean(out.entropy),
            "policy/approxkl_avg": mean(0.5 * (out.logp - exp.logp) ** 2),
            "loss/policy_avg": mean(-exp.advantages * out.logp),
            "loss/value_avg": mean(vf),
        }
        return Loss({"policy": Term(total, mask.sum()), "value": Term((mask * vf).sum(), mask.sum(), value_coef)}, metrics)

    return Objective(loss)
