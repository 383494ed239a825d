"""Natural language policy optimisation (Ramamurthy et al. 2022, RL4LMs, 2210.01241): PPO whose policy may only write what an
older copy of itself, the masking policy, holds likely. The PPO parts are those of Stable-Baselines3, on which RL4LMs stands.

params {"policy", "value"}; aux {"policy"}: what the masking policy has in the place of what is trained, a hard copy made every so
many rollouts, or only once, before the first. It stands still between, so the mask of a rollout is computed again where it is needed, and stored nowhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign import tree
from jaxalign.objectives.ppo import policy_loss, states_and_values
from jaxalign.ops.allowed import Rule, masked_logprob
from jaxalign.ops.logprob import before, targets
from jaxalign.types import Experience, Loss, Model, Objective, ScalarModel, Term, UserError


def squared_value_loss(values, returns):
    """(V - R)^2, f32[B,T]: no clip and no 1/2 (Stable-Baselines3)."""
    return (values - returns) ** 2


def masking_policy(aux, frozen) -> dict:
    """The whole masking policy: the copies of what is trained, and what is frozen of the policy."""
    return tree.merge(aux["policy"], frozen["base"].get("policy", {})) if "base" in frozen else aux["policy"]


def masked_logps(model: Model, policy, masking, batch, x, mask, rule: Rule, temperature):
    """`masked_logprob` of a batch. x: the policy's hidden states before each token; the masking policy reads the same text."""
    h = model.hidden(masking, batch.tokens, batch.segments, batch.positions)
    return masked_logprob(x, model.unembed(policy), before(h.x, batch.segments), model.unembed(masking), batch.tokens, mask, rule, temperature=temperature)


def nlpo(
    model: Model,
    value: ScalarModel | None = None,
    *,
    clip: float = 0.2,
    vf_coef: float = 0.5,
    entropy_coef: float = 0.0,
    mask_type: str = "learned_top_p",
    top_mask: float = 0.9,
    min_tokens_to_keep: int = 100,
    target_update_iterations: int = 5,
    temperature: float = 1.0,
    special: tuple[int, ...] = (),
    updates: int = 1,
) -> Objective:
    """Clipped policy loss of masked log-probs, value loss, entropy over the allowed tokens; means over the tokens of the step.
    Advantages get mean 0 and std 1 (of the population, + 1e-8) over the whole minibatch, whatever pieces it comes in.

    mask_type: of `ops.allowed.KINDS`; of top_p and top_k the masking policy stays the one that training began with. special: ids that
    are always allowed; updates: steps of a rollout, so that the masking policy is copied after every
    target_update_iterations rollouts. value None: the critic is a head on the policy.
    """
    rule = Rule(mask_type, top_mask, min_tokens_to_keep, tuple(special))
    if target_update_iterations < 1 or updates < 1:
        raise UserError(f"objective.target_update_iterations {target_update_iterations} must be 1 or more")

    def stats(params, frozen, aux, batch: Experience):
        mask = targets(batch.mask, batch.segments)
        advantages, n = jnp.where(mask > 0, batch.advantages, 0.0), mask.sum()
        return {"mean": (advantages.sum(), n), "square": ((advantages**2).sum(), n)}

    def loss(params, frozen, aux, batch: Experience, key, stats) -> Loss:
        mask = targets(batch.mask, batch.segments)
        n = mask.sum()
        batch = batch._replace(**{k: jnp.where(mask > 0, getattr(batch, k), 0.0) for k in ("logp", "values", "advantages", "returns")})
        x, values = states_and_values(model, value, params, batch)
        out, count = masked_logps(model, params["policy"], masking_policy(aux, frozen), batch, x, mask, rule, temperature)
        std = jnp.sqrt(jnp.maximum(stats["square"] - stats["mean"] ** 2, 0.0))
        advantages = (batch.advantages - stats["mean"]) / (std + 1e-8)
        pg, clipped = policy_loss(out.logp, batch.logp, advantages, mask, clip)
        vf = squared_value_loss(values, batch.returns)
        terms = {"policy": Term((mask * pg).sum(), n), "value": Term((mask * vf).sum(), n, vf_coef)}
        if entropy_coef:
            terms["entropy"] = Term(-(mask * out.entropy).sum(), n, entropy_coef)
        mean = lambda v: jax.lax.stop_gradient(((mask * v).sum(), n))
        d = jnp.where(mask > 0, out.logp - batch.logp, 0.0)
        metrics = {
            "policy/approxkl_avg": mean(0.5 * d**2),
            "policy/clipfrac_avg": mean(clipped),
            "policy/entropy_avg": mean(out.entropy),
            "loss/policy_avg": mean(pg),
            "loss/value_avg": mean(vf),
            "val/ratio": mean(jnp.exp(jnp.minimum(d, 20.0))),
            "val/allowed": mean(count),
        }
        return Loss(terms, metrics)

    def update_aux(aux, params, metrics, step):
        due = (step + 1) % (target_update_iterations * updates) == 0
        return {"policy": jax.tree.map(lambda new, old: jnp.where(due, new, old), params["policy"], aux["policy"])}

    learns = update_aux if mask_type.startswith("learned") else None
    return Objective(loss, stats=stats, init_aux=lambda params: {"policy": params["policy"]}, update_aux=learns)
