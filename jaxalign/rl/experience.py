"""Rollout + scores + reference -> what a policy's loss reads: `make_experience` for PPO, `group_experience` without a critic."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxalign.objectives.ppo import states_and_values
from jaxalign.ops import advantage, branches
from jaxalign.ops.logprob import before, logprob, targets
from jaxalign.ops.masked import masked_mean, masked_whiten
from jaxalign.rl import rewards
from jaxalign.types import Experience, GroupExperience, Model, Rollout, ScalarModel, Tokens


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("temperature",))
def token_logps(model: Model, params, rows, *, temperature=1.0):
    """LogProbs of anything with tokens, mask, segments and positions: the reference's side of the KL."""
    h = model.hidden(params, rows.tokens, rows.segments, rows.positions)
    mask = targets(rows.mask, rows.segments)
    return logprob(before(h.x, rows.segments), model.unembed(params), rows.tokens, mask, temperature=temperature)


@functools.partial(
    jax.jit,
    static_argnums=(0, 1),
    static_argnames=("temperature", "gamma", "lam", "kl_estimator", "whiten_rewards", "whiten_advantages", "missing_eos_penalty", "clip_score", "importance_cap"),
)
def make_experience(
    model: Model,
    value: ScalarModel | None,
    params,
    reference,
    rollout: Rollout,
    scores,
    beta,
    *,
    temperature: float = 1.0,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_estimator: str = "k1",
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    missing_eos_penalty: float = 0.0,
    clip_score: float | None = None,
    importance_cap: float | None = None,
):
    """(Experience, metrics f32[] each, TRL's names) (methods.md 4.2 to 4.6).

    Old log-probs and values come from the training forward, not from the sampler; `logprob_gap` says how far the two
    are apart (nats, largest over the batch). `importance_cap`: as in `importance`; None where the sampler is the policy.
    """
    mask = targets(rollout.mask, rollout.segments)
    x, values = states_and_values(model, value, params, rollout)
    old = logprob(x, model.unembed(params["policy"]), rollout.tokens, mask, temperature=temperature)
    ref = token_logps(model, reference, rollout, temperature=temperature)
    score = rewards.adjust(scores, rollout.truncated, missing_eos_penalty=missing_eos_penalty, clip=clip_score)
    kl_t = advantage.kl_tokens(old.logp, ref.logp, kl_estimator)
    r = advantage.token_rewards(score, kl_t, mask, beta)
    if whiten_rewards:
        r = masked_whiten(r, mask, shift_mean=False)
    adv, returns = advantage.gae(r, values, mask, gamma, lam)
    explained = 1 - ((mask * (returns - values)) ** 2).sum() / jnp.maximum((mask * (returns - masked_mean(returns, mask)) ** 2).sum(), 1e-8)
    d = mask * (old.logp - ref.logp)
    metrics = {
        "objective/kl": d.sum(1).mean(),
        "objective/kl_k3": (mask * advantage.kl_tokens(old.logp, ref.logp, "k3")).sum(1).mean(),
        "objective/entropy": old.entropy.sum(1).mean(),
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/non_score_reward": -beta * (mask * kl_t).sum(1).mean(),
        "objective/rlhf_reward": r.sum(1).mean(),
        "objective/beta": jnp.asarray(beta, jnp.float32),
        "completions/mean_length": mask.sum(1).mean(),
        "completions/truncated_frac": rollout.truncated.mean(),
        "val/explained_variance": explained,
        "logprob_gap": jnp.abs(jnp.where(mask > 0, old.logp - rollout.logp, 0.0)).max(),
    }
    if whiten_advantages:
        adv = masked_whiten(adv, mask)
    if importance_cap is not None:
        weight, more = importance(old.logp, rollout.logp, mask, importance_cap)
        adv, metrics = adv * weight, metrics | more
    return Experience(rollout.tokens, mask, rollout.segments, rollout.positions, old.logp, values, adv, returns), metrics


def importance(logp, sampled, mask, cap):
    """(weights f32[B,T], their metrics): min(pi / pi_sampler, cap), which corrects a policy gradient for samples of another
    policy, token by token, at a bounded variance (truncated importance sampling; methods of IMPALA, 1802.01561, section 4.1).
    """
    ratio = jnp.where(mask > 0, jnp.exp(jnp.minimum(logp - sampled, 20.0)), 0.0)
    weight = jnp.minimum(ratio, cap)
    name = "sampling/importance_sampling_ratio"
    return weight, {f"{name}/mean": masked_mean(weight, mask), f"{name}/max": ratio.max()}


OLD_LOGP = ("forward", "rollout", "current")


@functools.partial(
    jax.jit,
    static_argnums=(0,),
    static_argnames=("group", "max_new", "temperature", "scale_rewards", "old_logp", "missing_eos_penalty", "clip_score", "importance_cap", "answers_per_row"),
)
def group_experience(
    model: Model,
    params,
    reference,
    rollout: Rollout,
    scores,
    *,
    group: int,
    max_new: int,
    temperature: float = 1.0,
    scale_rewards: str = "group",
    old_logp: str = "forward",
    missing_eos_penalty: float = 0.0,
    clip_score: float | None = None,
    importance_cap: float | None = None,
    answers_per_row: int = 1,
):
    """(GroupExperience, metrics f32[] each, TRL's names) of rollouts in which `group` consecutive rows answer one prompt.

    reference None: no KL penalty, no forward pass for it. old_logp: by the training "forward", the "rollout"'s own, or
    "current": none, where a rollout is trained on once and the policy is still its own old one. scale_rewards: a key of
    `advantage.GROUP_ADVANTAGES`. answers_per_row: that many answers share a row and its prompt (`ops.branches`); the rows are
    then [B / answers_per_row, P + answers_per_row * max_new], in the order of the groups.
    """
    score = rewards.adjust(scores, rollout.truncated, missing_eos_penalty=missing_eos_penalty, clip=clip_score)
    adv = advantage.GROUP_ADVANTAGES[scale_rewards](score, group)
    length = targets(rollout.mask, rollout.segments).sum(1)
    metrics = {
        "reward": jnp.nanmean(score),
        "reward_std": jnp.nanstd(score, ddof=1),
        "frac_reward_zero_std": advantage.constant_groups(score, group).mean(),
        "completions/mean_length": length.mean(),
        "completions/min_length": length.min(),
        "completions/max_length": length.max(),
        "completions/clipped_ratio": rollout.truncated.mean(),
    }
    adv = jnp.broadcast_to(adv[:, None], rollout.tokens.shape)
    rows = GroupExperience(rollout.tokens, rollout.mask, rollout.segments, rollout.positions, adv, rollout.logp)
    if answers_per_row > 1:
        f, segments = branches.join(rows, rollout.tokens.shape[1] - max_new, answers_per_row)
        rows = GroupExperience(*(f(x) for x in rows[:6]))._replace(segments=segments)
    mask = targets(rows.mask, rows.segments)
    old = rows.sampled
    if old_logp == "forward":
        old = token_logps(model, params["policy"], rows, temperature=temperature).logp
        metrics["logprob_gap"] = jnp.abs(jnp.where(mask > 0, old - rows.sampled, 0.0)).max()
    if importance_cap is not None:
        weight, more = importance(old, rows.sampled, mask, importance_cap)
        rows, metrics = rows._replace(advantages=rows.advantages * weight), metrics | more
    ref = None if reference is None else token_logps(model, reference, rows, temperature=temperature).logp
    rows = rows._replace(mask=mask, advantages=rows.advantages * mask, sampled=rows.sampled * mask)
    return rows._replace(logp=None if old_logp == "current" else old, ref_logp=ref), {k: v.astype(jnp.float32) for k, v in metrics.items()}


def answers_per_row(group: int, prompt: int, new: int, dim: int, rows: int, parts: int) -> int:
    """How many answers of a group best share a row: each one more saves its prompt, and makes the attention of all longer.
    rows (of one answer) must still divide into `parts`."""
    fits = [k for k in range(1, group + 1) if group % k == 0 and (rows // k) % parts == 0]
    return min(fits, key=lambda k: branches.cost(dim, prompt + k * new) / k)


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("group", "max_new"))
def answers(model: Model, params, reference, rollout: Rollout, scores, *, group: int, max_new: int):
    """(Tokens, metrics): the answers themselves, for losses that need no more of a rollout than what was said. Scores are logged."""
    length = targets(rollout.mask, rollout.segments).sum(1)
    metrics = {
        "reward": jnp.nanmean(scores),
        "reward_std": jnp.nanstd(scores),
        "completions/mean_length": length.mean(),
        "completions/min_length": length.min(),
        "completions/max_length": length.max(),
        "completions/clipped_ratio": rollout.truncated.mean(),
    }
    return Tokens(*rollout[:4]), {k: v.astype(jnp.float32) for k, v in metrics.items()}
