"""Rollout + scores + reference -> what a policy's loss reads: `make_experience` for PPO, `group_experience` without a critic."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxalign.objectives.ppo import states_and_values
from jaxalign.ops import advantage, branches
from jaxalign.ops.logprob import before, logits, logprob, targets
from jaxalign.ops.masked import WHITEN, masked_mean, segment_sums, top_share
from jaxalign.rl import rewards
from jaxalign.types import Experience, GroupExperience, Model, Rollout, ScalarModel, Tokens, UserError


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("temperature",))
def token_logps(model: Model, params, rows, *, temperature=1.0):
    """LogProbs of anything with tokens, mask, segments and positions: the reference's side of the KL."""
    h = model.hidden(params, rows.tokens, rows.segments, rows.positions)
    mask = targets(rows.mask, rows.segments)
    return logprob(before(h.x, rows.segments), model.unembed(params), rows.tokens, mask, temperature=temperature)


def kl_tokens(model: Model, policy, reference, rows, old, ref, kind: str, temperature=1.0):
    """f32[B,T], what the KL penalty of each token is: an estimate on the one that was sampled (`advantage.kl_tokens`, of log-probs old and
    ref f32[B,T]), or "full", KL(policy || reference) over the whole vocabulary, by the policy as it is now. One place of all rows at a time:
    no [B,T,V]; the compiler runs the same two forwards once."""
    if kind != "full":
        return advantage.kl_tokens(old, ref, kind)
    x, y = (before(model.hidden(p, rows.tokens, rows.segments, rows.positions).x, rows.segments).swapaxes(0, 1) for p in (policy, reference))
    u, v = model.unembed(policy), model.unembed(reference)
    logps = lambda x, u: jax.nn.log_softmax(logits(x[:, None], u, temperature)[:, 0])
    return jax.lax.map(lambda at: advantage.full_kl(logps(at[0], u), logps(at[1], v)), (x, y)).T


@functools.partial(
    jax.jit,
    static_argnums=(0, 1),
    static_argnames=(
        "temperature", "gamma", "lam", "kl_estimator", "whiten_rewards", "whiten_advantages", "whiten_form", "missing_eos_penalty", "missing_eos_value",
        "clip_score", "importance_cap", "importance_form",
    ),
)  # fmt: skip
def make_experience(
    model: Model,
    value: ScalarModel | None,
    params,
    reference,
    rollout: Rollout,
    scores,
    beta,
    divisor=1.0,
    *,
    temperature: float = 1.0,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_estimator: str = "k1",
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    whiten_form: str = "bessel",
    missing_eos_penalty: float = 0.0,
    missing_eos_value: float | None = None,
    clip_score: float | None = None,
    importance_cap: float | None = None,
    importance_form: str = "token_truncate",
):
    """(Experience, metrics f32[] each, TRL's names).

    Old log-probs and values come from the training forward, not from the sampler; `logprob_gap` says how far the two
    are apart (nats, largest over the batch). divisor: of the scores, after penalty and clip (`rl.control.ScoreScale`).
    whiten_form: a key of `masked.WHITEN`. `importance_cap`: as in `importance`; None where the sampler is the policy.

    scores f32[B], or f32[B,T] of each token. A row that has none (NaN) is left out: its mask is 0.
    """
    mask = targets(rollout.mask, rollout.segments)
    rated = ~jnp.isnan(scores.reshape(len(scores), -1)).any(1)
    mask = mask * rated[:, None]
    total = jnp.where(rated, scores if scores.ndim == 1 else scores.sum(1), jnp.nan)
    scores = jnp.nan_to_num(scores)
    x, values = states_and_values(model, value, params, rollout)
    old = logprob(x, model.unembed(params["policy"]), rollout.tokens, mask, temperature=temperature)
    ref = token_logps(model, reference, rollout, temperature=temperature)
    kl_t = kl_tokens(model, params["policy"], reference, rollout, old.logp, ref.logp, kl_estimator, temperature)
    whole = dict(missing_eos_penalty=missing_eos_penalty, clip=clip_score)
    if scores.ndim == 1:
        r = advantage.token_rewards(rewards.adjust(scores, rollout.truncated, missing_eos_value=missing_eos_value, **whole) / divisor, kl_t, mask, beta)
    elif missing_eos_value is not None:
        raise UserError("rl.missing_eos_value takes the place of an answer's one score, and these are scores of tokens; use rl.missing_eos_penalty")
    else:
        r = mask * (rewards.adjust_tokens(scores, rollout.truncated, mask, **whole) / divisor - beta * kl_t)
    n = jnp.maximum(rated.sum(), 1)  # rows without a score are in no mask, and in no mean
    each = lambda x: x.sum() / n
    raw = r
    if whiten_rewards:
        r = WHITEN[whiten_form](r, mask, shift_mean=False)
    adv, returns = advantage.gae(r, values, mask, gamma, lam)
    off = returns - values
    explained = 1 - (mask * (off - masked_mean(off, mask)) ** 2).sum() / jnp.maximum((mask * (returns - masked_mean(returns, mask)) ** 2).sum(), 1e-8)
    d = mask * (old.logp - ref.logp)
    metrics = {
        "objective/kl": each(d),
        "objective/kl_k3": each(mask * advantage.kl_tokens(old.logp, ref.logp, "k3")),
        "objective/kl_per_token": masked_mean(d, mask),
        "objective/entropy": each(old.entropy),
        "objective/scores": jnp.nanmean(total),
        "objective/scores_std": jnp.nanstd(total),
        "objective/non_score_reward": -beta * each(mask * kl_t),
        "objective/rlhf_reward": each(raw),
        "objective/beta": jnp.asarray(beta, jnp.float32),
        "completions/mean_length": each(mask),
        "completions/truncated_frac": rollout.truncated.mean(),
        "val/explained_variance": explained,
        "logprob_gap": jnp.abs(jnp.where(mask > 0, old.logp - rollout.logp, 0.0)).max(),
    }
    if whiten_advantages:
        adv = WHITEN[whiten_form](adv, mask)
    if importance_cap is not None:
        weight, more = importance(old.logp, rollout.logp, mask, importance_cap, rollout.segments, importance_form)
        adv, metrics = adv * weight, metrics | more
    return Experience(rollout.tokens, mask, rollout.segments, rollout.positions, old.logp, values, adv, returns), metrics


# What becomes of an importance ratio above the cap: truncated, or its token not trained on; ratios of tokens, or of answers
# (TRL's vllm_importance_sampling_mode).
IMPORTANCE = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def importance(logp, sampled, mask, cap, segments=None, form: str = "token_truncate"):
    """(weights f32[B,T], their metrics): pi / pi_sampler, which corrects a policy gradient for samples of another policy (an older
    one, or another program's), bounded by `cap` so that its variance is (truncated importance sampling; IMPALA, 1802.01561,
    section 4.1). form: of IMPORTANCE.
    """
    gap = jnp.where(mask > 0, logp - sampled, 0.0)
    if form.startswith("sequence"):
        gap = segment_sums(gap, segments)
    ratio = jnp.where(mask > 0, jnp.exp(jnp.minimum(gap, 20.0)), 0.0)
    weight = jnp.minimum(ratio, cap) if form.endswith("truncate") else jnp.where(ratio <= cap, ratio, 0.0)
    name = "sampling/importance_sampling_ratio"
    return weight, {f"{name}/mean": masked_mean(weight, mask), f"{name}/max": ratio.max()}


OLD_LOGP = ("forward", "rollout", "current")


def summary(score, rollout: Rollout, group: int) -> dict:
    """The metrics that all rollouts of groups have. A row without an answer (`OnlineSource`'s dynamic sampling) does not count."""
    length = targets(rollout.mask, rollout.segments).sum(1)
    some = length > 0
    n = jnp.maximum(some.sum(), 1)
    return {
        "reward": jnp.nanmean(score),
        "reward_std": jnp.nanstd(score, ddof=1),
        "frac_reward_zero_std": advantage.constant_groups(score, group).mean(),
        "completions/mean_length": length.sum() / n,
        "completions/min_length": jnp.where(some, length, jnp.inf).min(),
        "completions/max_length": length.max(),
        "completions/clipped_ratio": jnp.where(some, rollout.truncated, 0).sum() / n,
    }


@functools.partial(
    jax.jit,
    static_argnums=(0,),
    static_argnames=(
        "group", "max_new", "temperature", "scale_rewards", "reward_weights", "old_logp", "missing_eos_penalty", "missing_eos_value", "clip_score", "overlong_buffer",
        "mask_truncated", "top_entropy", "beta", "kl_estimator", "importance_cap", "importance_form", "answers_per_row",
    ),
)  # fmt: skip
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
    reward_weights: tuple[float, ...] = (),
    old_logp: str = "forward",
    missing_eos_penalty: float = 0.0,
    missing_eos_value: float | None = None,
    clip_score: float | None = None,
    overlong_buffer: int = 0,
    mask_truncated: bool = False,
    top_entropy: float = 1.0,
    beta: float = 0.0,
    kl_estimator: str = "k1",
    importance_cap: float | None = None,
    importance_form: str = "token_truncate",
    answers_per_row: int = 1,
):
    """(GroupExperience, metrics f32[] each, TRL's names) of rollouts in which `group` consecutive rows answer one prompt.

    scores f32[B], or f32[B,K] of K reward functions, which `reward_weights` (empty: all 1) add up; NaN: not scored, advantage 0.
    reference None: no KL penalty, no forward pass for it. scale_rewards: a key of `advantage.GROUP_ADVANTAGES` or SEVERAL.
    old_logp: by the training "forward", the "rollout"'s own, or "current": none, where a rollout is trained on once and the
    policy is still its own old one. overlong_buffer: `advantage.overlong_penalty` over the last so many tokens (0: none).
    mask_truncated: answers that ran out of room are not trained on (overlong filtering; their rewards still are their group's).
    top_entropy: only that share of the tokens, those of the highest entropy, keep their advantage (2506.01939). beta: times the
    `kl_estimator` of the whole answer, off its reward (RLOO). answers_per_row: that many answers share a row and its prompt
    (`ops.branches`); the rows are then [B / answers_per_row, P + answers_per_row * max_new], in the order of the groups.
    """
    if beta and reference is None:
        raise UserError(f"rl.beta {beta} takes a KL penalty off the reward, and there is no reference")
    if scale_rewards in advantage.SEVERAL and (scores.ndim == 1 or beta or overlong_buffer or missing_eos_penalty or missing_eos_value is not None or clip_score is not None):
        raise UserError(f"rl.scale_rewards {scale_rewards} is of several rewards apart (rl.combine apart) and knows no penalties beside them; write those as rewards of their own")
    k, prompt = answers_per_row, rollout.tokens.shape[1] - max_new
    rows = GroupExperience(rollout.tokens, rollout.mask, rollout.segments, rollout.positions, rollout.logp, rollout.logp)
    spread = lambda a: jnp.broadcast_to(a[:, None], rows.tokens.shape)  # f32[B] of answers -> of their tokens
    each = lambda x: x.sum(1)  # and back
    if k > 1:
        f, segments = branches.join(rows, prompt, k)
        rows = GroupExperience(*(f(x) for x in rows[:6]))._replace(segments=segments)
        spread = lambda a: jnp.pad(jnp.repeat(a.reshape(-1, k), max_new, 1), ((0, 0), (prompt, 0)))
        each = lambda x: x[:, prompt:].reshape(-1, max_new).sum(1)
    mask = targets(rows.mask, rows.segments)
    length = targets(rollout.mask, rollout.segments).sum(1)

    now = None
    if old_logp == "forward" or top_entropy < 1 or (old_logp == "current" and (beta or importance_cap is not None)):
        now = token_logps(model, params["policy"], rows, temperature=temperature)
    old = rows.sampled if now is None or old_logp == "rollout" else now.logp
    ref = None if reference is None else token_logps(model, reference, rows, temperature=temperature).logp

    score = rewards.adjust(advantage.summed_rewards(scores, reward_weights), rollout.truncated, missing_eos_penalty=missing_eos_penalty, missing_eos_value=missing_eos_value, clip=clip_score)
    if overlong_buffer:
        score = score + advantage.overlong_penalty(length, max_new, overlong_buffer)
    metrics = summary(score, rollout, group)
    if beta:
        kl = each(mask * kl_tokens(model, params["policy"], reference, rows, old, ref, kl_estimator, temperature))
        score, metrics["objective/kl"] = score - beta * kl, kl.sum() / jnp.maximum((length > 0).sum(), 1)
    if scale_rewards in advantage.SEVERAL:
        adv = spread(advantage.SEVERAL[scale_rewards](scores, group, reward_weights))
    else:
        adv = spread(advantage.GROUP_ADVANTAGES[scale_rewards](score, group))
    if top_entropy < 1:
        adv = adv * top_share(now.entropy, mask, top_entropy)
    if old_logp == "forward":
        metrics["logprob_gap"] = jnp.abs(jnp.where(mask > 0, old - rows.sampled, 0.0)).max()
    if importance_cap is not None:
        weight, more = importance(old, rows.sampled, mask, importance_cap, rows.segments, importance_form)
        adv, metrics = adv * weight, metrics | more
    if mask_truncated:
        mask = mask * (1 - spread(rollout.truncated))
    rows = rows._replace(mask=mask, advantages=adv * mask, sampled=rows.sampled * mask)
    return rows._replace(logp=None if old_logp == "current" else old, ref_logp=ref), {k: v.astype(jnp.float32) for k, v in metrics.items()}


def answers_per_row(group: int, prompt: int, new: int, dim: int, rows: int, parts: int) -> int:
    """How many answers of a group best share a row: each one more saves its prompt, and makes the attention of all longer.
    rows (of one answer) must still divide into `parts`."""
    fits = [k for k in range(1, group + 1) if group % k == 0 and (rows // k) % parts == 0]
    return min(fits, key=lambda k: branches.cost(dim, prompt + k * new) / k)


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("group", "max_new"))
def answers(model: Model, params, reference, rollout: Rollout, scores, *, group: int, max_new: int):
    """(Tokens, metrics): the answers themselves, for losses that need no more of a rollout than what was said. Scores are logged."""
    metrics = summary(scores, rollout, group)
    del metrics["frac_reward_zero_std"]  # nothing here compares the answers to a prompt
    return Tokens(*rollout[:4]), {k: v.astype(jnp.float32) for k, v in metrics.items()}
