"""A trust region around the policy that sampled (TRPO, Schulman et al. 2015, 1502.05477, eq. 14) on `Experience`: the mean of
ratio x advantage is maximised while KL(old || new), a mean over tokens, stays below `max_kl`.

Held by a penalty whose multiplier adapts from rollout to rollout (Schulman et al. 2017, 1707.06347, section 4, eq. 8), not by conjugate
gradients and a line search as in TRPO itself and RL4LMs: those take a natural-gradient step of a whole rollout at once, outside of
any optimizer; a penalty is one more term of a loss, and every optimizer, mesh and adapter serves it. What is given up is the
guarantee: a single rollout may overstep, and the next ones then pay more.

params are {"policy": ..., "value": ...} as PPO's; aux {"multiplier"}.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.objectives.ppo import states_and_values, value_loss
from jaxalign.ops.logprob import targets, token_loss
from jaxalign.types import Experience, Loss, Model, Objective, ScalarModel, Term, UserError

RANGE = 2.0**10  # the multiplier stays within this factor of where it started: what a long calm has halved away must soon be back


def penalised(logp, old_logp, advantages, multiplier):
    """(loss, kl), f32[B,T]: -A r + multiplier kl with r = exp(logp - old) and kl = r - 1 - log r (1707.06347 eq. 8).

    kl is the k3 form (Schulman 2020, "Approximating KL divergence"): under samples of the old policy its mean is KL(old || new), and it
    is never negative. The papers sum over all actions; this reads the ones that were sampled, by the log-probs kept with them. r is
    bounded by e^20, to be finite."""
    gap = jnp.minimum(logp - old_logp, 20.0)
    kl = jnp.expm1(gap) - gap
    return -advantages * jnp.exp(gap) + multiplier * kl, kl


def adapted(multiplier, kl, max_kl):
    """Twice as much where kl > 1.5 max_kl, half as much where kl < max_kl / 1.5 (1707.06347, section 4)."""
    return multiplier * jnp.where(kl > 1.5 * max_kl, 2.0, jnp.where(kl < max_kl / 1.5, 0.5, 1.0))


def trpo(
    model: Model,
    value: ScalarModel | None = None,
    *,
    max_kl: float = 0.01,
    multiplier: float = 1.0,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
    temperature: float = 1.0,
    updates: int = 4,
) -> Objective:
    """-A r + multiplier KL(old || new) + value_coef x PPO's value loss, token means over the step. value None: the critic is a head
    on the policy.

    max_kl: nats per token, of a rollout's last update against the policy that sampled; multiplier: of the first rollout.
    updates: steps of a rollout, after the last of which the multiplier adapts, to the KL that this step began with. Raises UserError
    below 2: the only step of a rollout begins with the policy that sampled.
    """
    if not max_kl > 0 or not multiplier > 0:
        raise UserError(f"objective.max_kl {max_kl} and objective.multiplier {multiplier} must be above 0")
    if updates < 2:
        raise UserError("a trust region is measured between the first update of a rollout and its last: set rl.epochs x rl.minibatches to 2 or more, or use a2c")

    def loss(params, frozen, aux, exp: Experience, key, stats) -> Loss:
        mask = targets(exp.mask, exp.segments)
        n = mask.sum()
        exp = exp._replace(**{k: jnp.where(mask > 0, getattr(exp, k), 0.0) for k in ("logp", "values", "advantages", "returns")})
        x, values = states_and_values(model, value, params, exp)
        extra = exp.logp, exp.advantages, jnp.broadcast_to(aux["multiplier"], mask.shape)
        total, out = token_loss(x, model.unembed(params["policy"]), exp.tokens, mask, extra, lambda logp, entropy, e: penalised(logp, *e)[0], temperature=temperature)
        pg, kl = penalised(out.logp, exp.logp, exp.advantages, 0.0)
        vf, vf_clipped = value_loss(values, exp.values, exp.returns, value_clip)
        d = jnp.where(mask > 0, out.logp - exp.logp, 0.0)
        mean = lambda x: jax.lax.stop_gradient(((mask * x).sum(), n))
        metrics = {
            "policy/kl_avg": mean(kl),
            "policy/kl_multiplier": (aux["multiplier"], jnp.ones(())),
            "policy/approxkl_avg": mean(0.5 * d**2),
            "policy/policykl_avg": mean(-d),
            "policy/entropy_avg": mean(out.entropy),
            "loss/policy_avg": mean(pg),
            "loss/value_avg": mean(vf),
            "val/clipfrac_avg": mean(vf_clipped),
            "val/ratio": mean(jnp.exp(jnp.minimum(d, 20.0))),
        }
        return Loss({"policy": Term(total, n), "value": Term((mask * vf).sum(), n, value_coef)}, metrics)

    def update(aux, params, metrics, step):
        now = jnp.clip(adapted(aux["multiplier"], metrics["policy/kl_avg"], max_kl), multiplier / RANGE, multiplier * RANGE)
        return {"multiplier": jnp.where((step + 1) % updates == 0, now, aux["multiplier"])}

    return Objective(loss, init_aux=lambda params: {"multiplier": jnp.full((), multiplier, jnp.float32)}, update_aux=update)
