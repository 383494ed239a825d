"""Reward losses: TRL's Bradley-Terry, K-rankings against a loop over pairs."""

from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from jaxalign.objectives import reward
from jaxalign.types import Pairs, Rankings

VECTORS = np.load(Path(__file__).parents[1] / "vectors/reward.npz")


@pytest.mark.parametrize("name, centre", [("bt", 0.0), ("bt_margin", 0.0), ("bt_center0.01", 0.01), ("bt_margin_center0.05", 0.05)])
def test_trl(name, centre):
    n = int(VECTORS["num_pairs"])
    ones = np.ones((n, 3), np.float32)
    margin = VECTORS["margin"] if "margin" in name else np.zeros(n, np.float32)
    batch = Pairs(tiny.replay_rows(ones), tiny.replay_rows(ones, first=n), np.zeros(n, np.float32), np.zeros(n, np.float32), margin)
    loss, metrics, grads = tiny.gradient(reward.pairs(tiny.ReplayReward(), centre=centre))(VECTORS["rewards"], batch)
    np.testing.assert_allclose(loss, VECTORS[f"loss__{name}"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads, VECTORS[f"grad__{name}"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], VECTORS["accuracy"], rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"], VECTORS["mean_margin"], rtol=1e-5)


def test_independent_k_rankings():
    r = VECTORS["independent_numpy__krank_rewards_best_to_worst"]
    got = jax.jit(reward.ranking)(r, np.tile(np.arange(4), (3, 1)), np.ones((3, 4), np.float32))
    np.testing.assert_allclose(got, VECTORS["independent_numpy__krank_loss_per_prompt"], rtol=1e-5, atol=1e-6)


def by_loop(r, rank, valid):
    """InstructGPT eq. 1 pair by pair, in float64: (loss per prompt, strict pairs per prompt)."""
    out = []
    for row, order, ok in zip(np.asarray(r, np.float64), rank, valid):
        who = [i for i in range(len(row)) if ok[i]]
        gaps = [row[i] - row[j] for i in who for j in who if order[i] < order[j]]
        out.append((np.mean([np.log1p(np.exp(-g)) for g in gaps]) if gaps else 0.0, len(gaps)))
    return np.array(out).T


def many(r, B=8, K=9):
    """K from 4 to 9 in one batch, ties everywhere; the last prompt is one big tie, the one before has one candidate."""
    valid = (np.arange(K) < np.array([4, 5, 6, 7, 8, 9, 1, 5])[:, None]).astype(np.float32)
    rank = r.integers(1, 5, (B, K)).astype(np.int32)
    rank[-1] = 2
    rank[5] = r.permutation(9)  # a full order: C(9,2) = 36 pairs
    return rank, valid


def test_rankings_equal_a_loop():
    r = np.random.default_rng(0)
    rank, valid = many(r)
    rewards = r.standard_normal((8, 9)).astype(np.float32)
    want, count = by_loop(rewards, rank, valid)
    assert count[5] == 36 and count[6] == count[7] == 0 and (count[:5] > 0).all()
    assert any(len(set(rank[i][valid[i] > 0])) < valid[i].sum() for i in range(5))  # ties are among them
    run = jax.jit(jax.value_and_grad(lambda x, rank: (lambda per: (per.sum(), per))(reward.ranking(x, rank, valid)), has_aux=True))
    (_, per), grad = run(rewards, rank)
    np.testing.assert_allclose(per, want, rtol=1e-5, atol=1e-6)
    # 0 for an all-tied prompt, and no gradient: it does not ask its candidates to be equal
    assert not np.asarray(grad)[6:].any() and not np.asarray(grad)[valid == 0].any()
    for junk in (1e9, np.nan, np.inf):
        garbage = np.where(valid > 0, rewards, junk).astype(np.float32)
        (_, per2), grad2 = run(garbage, np.where(valid > 0, rank, -7))
        np.testing.assert_array_equal(per2, per)
        np.testing.assert_array_equal(grad2, grad)


def test_the_objective_averages_over_prompts_with_a_strict_pair():
    """Six of eight prompts have one: the loss is the loop's sum over 6, centring eta * mean over pairs of (r_i + r_j)^2."""
    r = np.random.default_rng(3)
    rank, valid = many(r)
    rows = tiny.rows(r, 8, 4, 9)
    rows.tokens[..., 0] = np.arange(72).reshape(8, 9)
    rewards = r.standard_normal(72).astype(np.float32)
    batch = Rankings(rows, rank, valid)
    loss, metrics, _ = tiny.gradient(reward.rankings(tiny.ReplayReward(), centre=0.05))(rewards, batch)
    table = rewards.reshape(8, 9)
    want, count = by_loop(table, rank, valid)
    squares, right, ties = [], 0, 0
    for row, order, ok in zip(table, rank, valid):
        who = [i for i in range(9) if ok[i]]
        strict = [(i, j) for i in who for j in who if order[i] < order[j]]
        squares += [np.mean([(row[i] + row[j]) ** 2 for i, j in strict])] if strict else []
        right += sum(row[i] > row[j] for i, j in strict)
    np.testing.assert_allclose(loss, want.sum() / 6 + 0.05 * np.sum(squares) / 6, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/reward"], want.sum() / 6, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], right / count.sum(), rtol=1e-6)


def test_two_candidates_are_a_pair():
    """K = 2 without a tie is Bradley-Terry."""
    r = np.random.default_rng(4).standard_normal((5, 2)).astype(np.float32)
    both = jax.jit(lambda r: (reward.ranking(r, np.array([[1, 2]] * 5), np.ones((5, 2))), reward.bradley_terry(r[:, 0], r[:, 1])))
    np.testing.assert_allclose(*both(r), rtol=1e-6)
