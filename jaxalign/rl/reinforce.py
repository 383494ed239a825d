"""Advantages that know the token: REINFORCE++ and ReMax, whose KL penalty is a reward of every token and not of the answer."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxalign import shard
from jaxalign.ops import advantage
from jaxalign.ops.logprob import targets
from jaxalign.ops.masked import population_whiten
from jaxalign.rl import engine, rewards
from jaxalign.rl.experience import importance, kl_tokens, summary, token_logps
from jaxalign.rl.rollout import Sampling
from jaxalign.types import GroupExperience, Model, Prompts, Rollout, UserError

BASELINES = {"none": lambda score, group: score, "group": advantage.centred_advantages}
STATIC = ("group", "temperature", "gamma", "beta", "kl_estimator", "old_logp", "missing_eos_penalty", "missing_eos_value", "clip_score", "importance_cap", "importance_form")


def _experience(model, params, reference, rollout, score, metrics, whiten, *, temperature, gamma, beta, kl_estimator, old_logp, importance_cap, importance_form):
    """From scores less their baseline, NaN where there is none: reward_t = -beta k_t, + score at the last token; A_t the sum of
    what follows, which `whiten(A, mask)` may shape."""
    if beta and reference is None:
        raise UserError(f"rl.beta {beta} takes a KL penalty off the reward, and there is no reference")
    mask = targets(rollout.mask, rollout.segments)
    ok = mask * ~jnp.isnan(score)[:, None]
    old, kl = rollout.logp, jnp.zeros_like(mask)
    if old_logp == "forward" or old_logp == "current" and (beta or importance_cap is not None):
        old = token_logps(model, params["policy"], rollout, temperature=temperature).logp
    if old_logp == "forward":
        metrics["logprob_gap"] = jnp.abs(jnp.where(mask > 0, old - rollout.logp, 0.0)).max()
    if beta:
        ref = token_logps(model, reference, rollout, temperature=temperature).logp
        kl = mask * kl_tokens(model, params["policy"], reference, rollout, old, ref, kl_estimator, temperature)
        metrics["objective/kl"] = kl.sum() / jnp.maximum(mask.any(1).sum(), 1)
    r = advantage.token_rewards(jnp.nan_to_num(score), kl, ok, beta)
    adv = whiten(advantage.gae(r, jnp.zeros_like(r), ok, gamma, 1.0)[0], ok)
    if importance_cap is not None:
        weight, more = importance(old, rollout.logp, mask, importance_cap, rollout.segments, importance_form)
        adv, metrics = adv * weight, metrics | more
    rows = GroupExperience(rollout.tokens, mask, rollout.segments, rollout.positions, adv, rollout.logp * mask, None if old_logp == "current" else old)
    return rows, {k: v.astype(jnp.float32) for k, v in metrics.items()}


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=(*STATIC, "baseline"))
def reinforce_experience(
    model: Model,
    params,
    reference,
    rollout: Rollout,
    scores,
    *,
    group: int,
    temperature: float = 1.0,
    baseline: str = "none",
    gamma: float = 1.0,
    beta: float = 0.01,
    kl_estimator: str = "k1",
    old_logp: str = "forward",
    missing_eos_penalty: float = 0.0,
    missing_eos_value: float | None = None,
    clip_score: float | None = None,
    importance_cap: float | None = None,
    importance_form: str = "token_truncate",
):
    """(GroupExperience, metrics) of REINFORCE++ (2501.03262): returns of per-token KL penalties and the score, whitened over the
    tokens of the whole batch (by the population's variance, as OpenRLHF does).

    baseline "group": scores less their group's mean first, the REINFORCE++-baseline of OpenRLHF.
    """
    score = rewards.adjust(scores, rollout.truncated, missing_eos_penalty=missing_eos_penalty, missing_eos_value=missing_eos_value, clip=clip_score)
    less = jnp.where(jnp.isnan(score), jnp.nan, BASELINES[baseline](score, group))
    return _experience(
        model, params, reference, rollout, less, summary(score, rollout, group), population_whiten, temperature=temperature, gamma=gamma, beta=beta, kl_estimator=kl_estimator,
        old_logp=old_logp, importance_cap=importance_cap, importance_form=importance_form,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=STATIC)
def remax_experience(
    model: Model,
    params,
    reference,
    rollout: Rollout,
    scores,
    *,
    group: int,
    temperature: float = 1.0,
    gamma: float = 1.0,
    beta: float = 0.0,
    kl_estimator: str = "k1",
    old_logp: str = "forward",
    missing_eos_penalty: float = 0.0,
    missing_eos_value: float | None = None,
    clip_score: float | None = None,
    importance_cap: float | None = None,
    importance_form: str = "token_truncate",
):
    """(GroupExperience, metrics) of ReMax (2310.10505): R - R(greedy answer). Of each prompt's group + 1 rows the last, the greedy
    one (`greedy`), gives its score and is not trained on."""
    score = rewards.adjust(scores, rollout.truncated, missing_eos_penalty=missing_eos_penalty, missing_eos_value=missing_eos_value, clip=clip_score)
    score, best = score.reshape(-1, group + 1)[:, :group], score.reshape(-1, group + 1)[:, group:]
    own = lambda x: shard.constrain(x.reshape(-1, group + 1, *x.shape[1:])[:, :group].reshape(-1, *x.shape[1:]), "batch", *(None,) * (x.ndim - 1)) if x.ndim else x
    rollout = jax.tree.map(own, rollout)
    metrics = summary(score.reshape(-1), rollout, group) | {"reward_greedy": jnp.nanmean(best)}
    return _experience(
        model, params, reference, rollout, (score - best).reshape(-1), metrics, lambda a, mask: a, temperature=temperature, gamma=gamma, beta=beta, kl_estimator=kl_estimator,
        old_logp=old_logp, importance_cap=importance_cap, importance_form=importance_form,
    )  # fmt: skip


def greedy(model: Model, how: Sampling, policy, reference, prompts: Prompts, key, version) -> Rollout:
    """A rival (`rl.online.OnlineSource`): the policy's own most likely answer, token by token."""
    return engine.generate(model, dataclasses.replace(how, temperature=0.0, top_k=0, top_p=1.0, slots=0, draft=""), policy, prompts, key, version)
