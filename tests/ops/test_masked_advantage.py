"""Masked statistics, per-token rewards and advantages: against TRL 0.11.4 and against plain loops."""

import jax
import numpy as np
import pytest
import recordings
from jaxalign.ops import advantage, masked

GROUPS = recordings.load("group_advantages.npz", "rewards_per_func*", "reward_weights", "group_size", "grpo_adv__*")
STATS, NANSTD = recordings.load("masked_stats.npz", "x", "mask", "masked_*", "whiten*"), recordings.load("logprobs.npz", "nanstd_*")
PPO = recordings.load("ppo.npz", "mask", "old_logps", "ref_logps", "scores", "values", "kl_tokens__*", "rewards__*", "full_*", "advantages_*", "returns_*")


def close(got, want, mask=None):
    got, want = (np.asarray(a) if mask is None else np.asarray(a)[mask > 0] for a in (got, want))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_masked_statistics_of_trl():
    x, mask = STATS["x"], STATS["mask"]

    @jax.jit
    def run(x, mask):
        return (
            masked.masked_mean(x, mask), masked.masked_mean(x, mask, 1), masked.masked_var(x, mask), masked.masked_var(x, mask, unbiased=False),
            masked.masked_whiten(x, mask), masked.masked_whiten(x, mask, shift_mean=False),
        )  # fmt: skip

    mean, mean1, unbiased, biased, white, kept = run(x, mask)
    close(mean, STATS["masked_mean"])
    close(mean1, STATS["masked_mean_axis1"])
    close(unbiased, STATS["masked_var_unbiased"])
    close(biased, STATS["masked_var_biased"])
    close(white, STATS["masked_whiten"], mask)
    close(kept, STATS["masked_whiten_keep_mean"], mask)
    garbage = np.where(mask > 0, x, np.inf).astype(np.float32)
    jax.tree.map(np.testing.assert_array_equal, run(garbage, mask), run(x, mask))
    ones = run(x, np.ones_like(mask))
    close(ones[4], STATS["whiten"])
    close(ones[5], STATS["whiten_keep_mean"])
    assert not any(np.asarray(v).any() for v in run(garbage, 0 * mask))  # an empty mask: 0, not NaN


@pytest.mark.parametrize("ours, theirs", [("k1", "kl"), ("abs", "abs"), ("k2", "mse")])
def test_rewards_of_trl(ours, theirs):
    mask = PPO["mask"]
    run = jax.jit(lambda a, b, s: (kl := advantage.kl_tokens(a, b, ours), advantage.token_rewards(s, kl, mask, 0.15)))
    kl, rewards = run(PPO["old_logps"], PPO["ref_logps"], PPO["scores"])
    close(kl, PPO[f"kl_tokens__{theirs}"], mask)
    close(rewards, PPO[f"rewards__kl_coef0.15__{theirs}"], mask)
    assert not np.asarray(rewards)[mask == 0].any()


def test_the_whole_kl_of_trl():
    close(advantage.full_kl(PPO["full_policy_logps"], PPO["full_ref_logps"]), PPO["kl_tokens__full"], PPO["mask"])


def test_k3_is_unbiased_for_the_kl():
    # p = (1/2, 1/2), q = (1/4, 3/4): E_p k3 = E_p k1 = KL(p||q) = (ln 2 + ln 2/3) / 2, and k3 >= 0 on each token
    p, q = np.log([0.5, 0.5]).astype(np.float32), np.log([0.25, 0.75]).astype(np.float32)
    k3 = np.asarray(jax.jit(lambda a, b: advantage.kl_tokens(a, b, "k3"))(p, q))
    np.testing.assert_allclose(k3.mean(), (np.log(2) + np.log(2 / 3)) / 2, rtol=1e-5)
    assert (k3 >= 0).all()


@pytest.mark.parametrize("gamma, lam, name", [(1, 0.95, "gamma1_lam0.95"), (0.99, 0.9, "gamma0.99_lam0.9"), (1, 1, "gamma1_lam1"), (1, 0, "gamma1_lam0"), (1, 0.95, "gamma1_lam0.95_whiten_rewards")])
def test_advantages_of_trl(gamma, lam, name):
    mask = PPO["mask"]

    @jax.jit
    def run(rewards, values):
        rewards = masked.masked_whiten(rewards, mask, shift_mean=False) if "whiten" in name else rewards
        adv, returns = advantage.gae(rewards, values, mask, gamma, lam)
        return adv, masked.masked_whiten(adv, mask), returns

    raw, white, returns = run(PPO["rewards__kl_coef0.15__kl"], PPO["values"])
    assert not np.asarray(raw)[mask == 0].any() and not np.asarray(returns)[mask == 0].any()
    if "whiten" in name:
        # There the padding, a reward of 0, is whitened with the others and is then not 0, and it flows back into the last tokens of
        # its row (a fault: ours stays 0). Rows without padding are not touched by it.
        full = mask * mask.all(1, keepdims=True)
        assert full.any(1).sum() == 2
        close(raw, PPO[f"advantages_raw__{name}"], full)
        close(returns, PPO[f"returns__{name}"], full)
        # Their numbers in all rows are what comes of giving every place that reward: the same statistics, and no mask after them.
        mean, var = (f(PPO["rewards__kl_coef0.15__kl"], mask) for f in (masked.masked_mean, masked.masked_var))
        rewards = (PPO["rewards__kl_coef0.15__kl"] * mask - mean) / np.sqrt(var + 1e-8) + mean
        raw, returns = advantage.gae(rewards, PPO["values"] * mask, np.ones_like(mask), gamma, lam)
        white = masked.masked_whiten(raw, mask)
    close(white, PPO[f"advantages_whitened__{name}"], mask)
    close(raw, PPO[f"advantages_raw__{name}"], mask)
    close(returns, PPO[f"returns__{name}"], mask)


def test_spreads_of_trl():
    """Over what is not NaN, unbiased. Of a single number theirs is NaN, and ours 0: it is a divisor."""
    x, want = NANSTD["nanstd_in"], NANSTD["nanstd_dim1"]
    got = advantage._moments(x, 1)[1][:, 0]
    alone = (~np.isnan(x)).sum(1) == 1
    np.testing.assert_array_equal(np.isnan(want), alone)
    close(got, np.where(alone, 0.0, want))


def test_gae_against_a_loop_over_gaps():
    r = np.random.default_rng(0)
    rewards, values = r.standard_normal((2, 6, 9)).astype(np.float32)
    mask = (r.random((6, 9)) < 0.6).astype(np.float32)
    mask[0], mask[1, :4] = 0, 0  # a row without a token; a prompt
    want = np.zeros((6, 9))
    for b in range(6):
        next_value = next_adv = 0.0
        for t in reversed(np.flatnonzero(mask[b])):  # only valid tokens exist
            next_adv = rewards[b, t] + 0.9 * next_value - values[b, t] + 0.9 * 0.8 * next_adv
            next_value = want_v = values[b, t]
            want[b, t] = next_adv
    run = jax.jit(lambda r, v: advantage.gae(r, v, mask, 0.9, 0.8))
    adv, returns = run(rewards, values)
    np.testing.assert_allclose(adv, want, atol=1e-5)
    np.testing.assert_allclose(returns, (want + values) * mask, atol=1e-5)
    garbage = run(np.where(mask > 0, rewards, 1e6), np.where(mask > 0, values, -1e6))
    jax.tree.map(np.testing.assert_array_equal, garbage, (adv, returns))


def test_the_score_falls_on_the_last_valid_token():
    mask = np.array([[0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]], np.float32)
    got = jax.jit(lambda: advantage.token_rewards(np.array([5.0, 7.0, 9.0], np.float32), np.ones((3, 4), np.float32), mask, 0.5))()
    np.testing.assert_array_equal(got, [[0, -0.5, 4.5, 0], [0, -0.5, 0, 6.5], [0, 0, 0, 0]])


@pytest.mark.parametrize("suffix", ["", "_nan"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_of_trl(scale, suffix):
    """Two weighted rewards, four prompts with four answers, the first group without variance; NaN where nothing was scored."""
    each = GROUPS[f"rewards_per_func{suffix}"]
    rewards = np.where(np.isnan(each).all(1), np.nan, np.nansum(each * GROUPS["reward_weights"], 1)).astype(np.float32)
    group = int(GROUPS["group_size"])
    got = jax.jit(lambda r: advantage.GROUP_ADVANTAGES[scale](r, group))(rewards)
    close(got, GROUPS[f"grpo_adv__scale_{scale}" + ("__nan" if suffix else "")])
    assert not np.asarray(got)[:group].any() or suffix
    np.testing.assert_array_equal(advantage.constant_groups(rewards, group)[0], not suffix or len(set(rewards[:group][~np.isnan(rewards[:group])])) < 2)


def test_segment_sums_by_loop():
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 3, 3, 0, 0, 0]], np.int32)
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    want = [[x[b][segments[b] == s].sum() for s in segments[b]] for b in range(2)]
    np.testing.assert_allclose(jax.jit(masked.segment_sums)(x, segments), want)
