"""Proximal policy optimisation on `Experience` (Schulman et al. 1707.06347; Ziegler et al. 1909.08593; InstructGPT).

params are {"policy": ..., "value": ...}; "value" is a head on the policy's trunk, or a network of its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.objectives.lm import cross_entropy
from jaxalign.ops import nn
from jaxalign.ops.logprob import before, targets, token_loss
from jaxalign.types import Experience, Loss, Model, Objective, ScalarModel, Term


def policy_loss(logp, old_logp, advantages, mask, clip):
    """(loss, clipped), f32[B,T]: max(-A r, -A clip(r, 1-e, 1+e)) with r = exp(logp - old) (1707.06347 eq. 7)."""
    ratio = _ratio(logp, old_logp, mask)
    plain, cut = -advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip, 1 + clip)
    return jnp.maximum(plain, cut), (cut > plain).astype(jnp.float32)


def _ratio(logp, old_logp, mask):
    """Bounded by e^20: what `ratio_threshold` drops must be finite to be dropped."""
    return jnp.exp(jnp.minimum(jnp.where(mask > 0, logp - old_logp, 0.0), 20.0))


def value_loss(values, old_values, returns, clip):
    """(loss, clipped), f32[B,T]: 1/2 max((V-R)^2, (clip(V, V_old +- e) - R)^2) (lm-human-preferences)."""
    near = jnp.clip(values, old_values - clip, old_values + clip)
    plain, cut = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * jnp.maximum(plain, cut), (cut > plain).astype(jnp.float32)


def went_too_far(target_kl: float, state) -> bool:
    """Whether the last update was of a policy more than 1.5 target_kl nats per token away from the one that sampled, in which case the
    rest of the rollout is skipped (TRL's early_stopping; `rl.online.OnlineSource`'s `stop`). Of a TrainState of `ppo(target_kl=...)`."""
    return float(state.aux["policykl"]) > 1.5 * target_kl


def states_and_values(model: Model, value: ScalarModel | None, params, batch):
    """(hidden states f[B,T,D], values f32[B,T]), both before each token: by one forward, two if the critic is separate.

    Used for the loss and for the old log-probs and values of `rl.experience`, so that the first minibatch has ratio 1.
    """
    h = model.hidden(params["policy"], batch.tokens, batch.segments, batch.positions)
    mask = targets(batch.mask, batch.segments)
    v = nn.scalar(params["value"], h.x) if value is None else value.scores(params["value"], batch.tokens, batch.segments, batch.positions)
    return before(h.x, batch.segments), before(v, batch.segments) * mask


def ppo(
    model: Model,
    value: ScalarModel | None = None,
    *,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    ratio_threshold: float = 10.0,
    target_kl: float | None = None,
    whiten_minibatch: bool = False,
    ptx_coef: float = 0.0,
) -> Objective:
    """Clipped policy and value losses, token means over the step. value=None: the critic is a head on the policy.

    A batch is an `Experience`, or {"ppo": Experience, "ptx": Tokens} when pretraining gradients are mixed in
    (PPO-ptx, InstructGPT eq. 2). When the mean ratio of a (micro-)batch passes `ratio_threshold` its PPO terms are
    dropped, as in TRL. target_kl: keeps what `went_too_far` asks about. whiten_minibatch: advantages are whitened over each
    minibatch, by the population's variance (lm-human-preferences), whatever was done to them over the rollout.
    """

    def moments(params, frozen, aux, batch):
        exp: Experience = batch["ppo"] if isinstance(batch, dict) else batch
        mask = targets(exp.mask, exp.segments)
        a = jnp.where(mask > 0, exp.advantages, 0.0)
        return {"mean": (a.sum(), mask.sum()), "square": ((a**2).sum(), mask.sum())}

    def loss(params, frozen, aux, batch, key, stats) -> Loss:
        mixed = isinstance(batch, dict)
        exp: Experience = batch["ppo"] if mixed else batch
        mask = targets(exp.mask, exp.segments)
        n = mask.sum()
        exp = exp._replace(**{k: jnp.where(mask > 0, getattr(exp, k), 0.0) for k in ("logp", "values", "advantages", "returns")})
        if whiten_minibatch:
            spread = jax.lax.rsqrt(jnp.maximum(stats["square"] - stats["mean"] ** 2, 0.0) + 1e-8)
            exp = exp._replace(advantages=mask * (exp.advantages - stats["mean"]) * spread)
        x, values = states_and_values(model, value, params, exp)

        def surrogate(logp, entropy, old):
            loss, _ = policy_loss(logp, *old, 1.0, clip)
            return loss - entropy_coef * entropy if entropy_coef else loss

        total, out = token_loss(
            x, model.unembed(params["policy"]), exp.tokens, mask, (exp.logp, exp.advantages), surrogate, entropy=bool(entropy_coef), temperature=temperature
        )
        pg, pg_clipped = policy_loss(out.logp, exp.logp, exp.advantages, mask, clip)
        vf, vf_clipped = value_loss(values, exp.values, exp.returns, value_clip)
        d = jnp.where(mask > 0, out.logp - exp.logp, 0.0)
        ratio = _ratio(out.logp, exp.logp, mask)
        keep = ((mask * ratio).sum() <= ratio_threshold * jnp.maximum(n, 1)).astype(jnp.float32)
        terms = {
            "policy": Term(keep * total, n),
            "value": Term(keep * (mask * vf).sum(), n, value_coef),
        }
        mean = lambda x: jax.lax.stop_gradient(((mask * x).sum(), n))
        metrics = {
            "policy/approxkl_avg": mean(0.5 * d**2),
            "policy/policykl_avg": mean(-d),
            "policy/clipfrac_avg": mean(pg_clipped),
            "policy/entropy_avg": mean(out.entropy),
            "loss/policy_avg": mean(pg),
            "loss/value_avg": mean(vf),
            "val/clipfrac_avg": mean(vf_clipped),
            "val/error": mean((values - exp.returns) ** 2),
            "val/mean": mean(exp.values),
            "returns/mean": mean(exp.returns),
            "val/ratio": mean(ratio),
            "val/dropped": (1 - keep, jnp.ones(())),
        }
        if mixed and ptx_coef:
            ce, tokens, _ = cross_entropy(model, params["policy"], batch["ptx"])
            terms["ptx"] = Term(ce.total, tokens, ptx_coef)
            metrics["loss/ptx_avg"] = jax.lax.stop_gradient((ce.nll, tokens))
        return Loss(terms, metrics)

    watched = {} if target_kl is None else {
        "init_aux": lambda params: {"policykl": jnp.zeros(())},
        "update_aux": lambda aux, params, metrics, step: {"policykl": metrics["policy/policykl_avg"]},
    }  # fmt: skip
    return Objective(loss, stats=moments if whiten_minibatch else None, **watched)
