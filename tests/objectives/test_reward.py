"""Reward losses: TRL's Bradley-Terry, K-rankings against a loop over pairs."""

import jax
import numpy as np
import pytest
import recordings
import tiny
from jaxalign.objectives import reward
from jaxalign.types import Labelled, Pairs, Rankings, Steps

VECTORS = recordings.load("reward.npz")


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
    squares, right = [], 0
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


def test_soft_labels():
    r = np.random.default_rng(5)
    w, l, m = r.standard_normal((3, 6)).astype(np.float32)
    q = np.array([0, 0.2, 0.5, 0.7, 1, 1], np.float32)
    got = np.asarray(jax.jit(reward.soft_bradley_terry)(w, l, q, m))
    d = (w - l - m).astype(np.float64)
    np.testing.assert_allclose(got, -q * np.log(1 / (1 + np.exp(-d))) - (1 - q) * np.log(1 / (1 + np.exp(d))), rtol=1e-5)
    np.testing.assert_allclose(got[q == 1], jax.jit(reward.bradley_terry)(w, l, m)[q == 1], rtol=1e-6)
    # least where sigma(d) = q: d = log 3 for q = 3/4
    np.testing.assert_allclose(jax.grad(lambda d: reward.soft_bradley_terry(d, 0.0, 0.75))(np.log(3.0)), 0, atol=1e-6)


def test_pairs_read_their_probabilities():
    n = 4
    rewards, ones, zero = np.random.default_rng(0).standard_normal(2 * n).astype(np.float32), np.ones((n, 3), np.float32), np.zeros(n, np.float32)
    go = lambda *q: tiny.gradient(reward.pairs(tiny.ReplayReward()))(rewards, Pairs(tiny.replay_rows(ones), tiny.replay_rows(ones, first=n), zero, zero, zero, *q))[0]
    np.testing.assert_allclose(go(np.ones(n, np.float32)), go(), rtol=1e-6)
    each = [float(reward.soft_bradley_terry(a, b, q)) for a, b, q in zip(rewards[:n], rewards[n:], (0.1, 0.5, 0.9, 1.0))]
    np.testing.assert_allclose(go(np.array([0.1, 0.5, 0.9, 1.0], np.float32)), np.mean(each), rtol=1e-5)


def test_best_of_k_is_the_softmax():
    """Ziegler et al. eq. 1 prompt by prompt, in float64; empty slots may hold anything; of a tie, what both have."""
    r = np.random.default_rng(6)
    rewards, valid = (3 * r.standard_normal((5, 4))).astype(np.float32), np.ones((5, 4), np.float32)
    valid[3, 2:], valid[4, 3] = 0, 0
    best = np.zeros((5, 4), np.float32)
    best[np.arange(5), [0, 3, 2, 1, 0]] = 1
    best[2, 1] = 1  # a tie
    want = [-np.log(sum(np.exp(np.float64(x)) for x, b in zip(row, b) if b) / sum(np.exp(np.float64(x)) for x, v in zip(row, v) if v)) for row, b, v in zip(rewards, best, valid)]
    got = jax.jit(reward.best_of)(rewards, best, valid)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for junk in (np.nan, np.inf, 1e30):
        np.testing.assert_array_equal(jax.jit(reward.best_of)(np.where(valid > 0, rewards, junk).astype(np.float32), best, valid), got)


def test_best_of_two_is_a_pair():
    r = np.random.default_rng(7).standard_normal((5, 2)).astype(np.float32)
    best, valid = np.tile(np.float32([1, 0]), (5, 1)), np.ones((5, 2), np.float32)
    np.testing.assert_allclose(*jax.jit(lambda r: (reward.best_of(r, best, valid), reward.bradley_terry(r[:, 0], r[:, 1])))(r), rtol=1e-5)


def test_the_best_objective_averages_over_prompts_that_prefer_something():
    r = np.random.default_rng(8)
    rank, valid = many(r)
    rows = tiny.rows(r, 8, 4, 9)
    rows.tokens[..., 0] = np.arange(72).reshape(8, 9)
    rewards = r.standard_normal(72).astype(np.float32)
    rewards[valid.reshape(-1) == 0] = np.nan
    loss, metrics, grads = tiny.gradient(reward.best(tiny.ReplayReward(), centre=0.05))(rewards, Rankings(rows, np.where(valid > 0, rank, -7), valid))
    ce, squares, hits, n = 0.0, 0.0, 0, 0
    for row, order, ok in zip(rewards.reshape(8, 9).astype(np.float64), rank, valid):
        who = [i for i in range(9) if ok[i]]
        top = [i for i in who if order[i] == min(order[j] for j in who)]
        rest = [i for i in who if i not in top]
        if rest:
            ce -= np.log(np.exp(row[top]).sum() / np.exp(row[who]).sum())
            squares += np.mean([(row[i] + row[j]) ** 2 for i in top for j in rest])
            hits, n = hits + (max(who, key=lambda i: row[i]) in top), n + 1
    assert n == 6
    np.testing.assert_allclose(loss, ce / 6 + 0.05 * squares / 6, rtol=1e-5)
    np.testing.assert_allclose(metrics["best_accuracy"], hits / 6, rtol=1e-6)
    grads = np.asarray(grads).reshape(8, 9)
    assert np.isfinite(grads).all() and not grads[valid == 0].any() and not grads[6:].any() and grads[:6].any(1).all()


def test_regression():
    r = np.random.default_rng(9)
    rewards, label = r.standard_normal((2, 8)).astype(np.float32)
    mask = np.ones((8, 3), np.float32)
    mask[5] = 0  # an empty row: weighs nothing, whatever it holds
    label[5] = np.nan
    loss, metrics, grads = tiny.gradient(reward.scores(tiny.ReplayReward()))(rewards, Labelled(tiny.replay_rows(mask), label, np.zeros(8, np.float32)))
    kept = np.arange(8) != 5
    d = (rewards - label)[kept].astype(np.float64)
    np.testing.assert_allclose([loss, metrics["mean_absolute_error"]], [(d**2).mean(), np.abs(d).mean()], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(grads)[kept], 2 * d / 7, rtol=1e-4)
    assert grads[5] == 0


class ReplayScores:
    """Gives row b, token t the score params[first token of b, t]."""

    def scores(self, params, tokens, segments, positions):
        return params[tokens[:, 0]]


def test_steps_weigh_alike_wherever_they_stand():
    """Cross entropy as torch's BCEWithLogits defines it, over the judged steps of the whole batch; the rest has no gradient."""
    torch = pytest.importorskip("torch")
    r = np.random.default_rng(10)
    table = (2 * r.standard_normal((4, 7))).astype(np.float32)
    mask, label = (r.random((4, 7)) < 0.4).astype(np.float32), r.random((4, 7)).astype(np.float32)
    mask[:, 0], mask[3] = 0, 0
    label[:2] = label[:2] > 0.5
    rows = tiny.replay_rows(mask[:, 1:])
    loss, metrics, grads = tiny.gradient(reward.steps(ReplayScores()))(table, Steps(rows, label))
    s = torch.tensor(table, requires_grad=True)
    want = torch.nn.functional.binary_cross_entropy_with_logits(s[mask > 0], torch.tensor(label)[mask > 0])
    want.backward()
    np.testing.assert_allclose(loss, want.item(), rtol=1e-5)
    np.testing.assert_allclose(grads, s.grad.numpy(), rtol=1e-4, atol=1e-7)
    on, sure = mask > 0, (mask > 0) & (label != 0.5)
    np.testing.assert_allclose(metrics["accuracy"], ((table > 0) == (label > 0.5))[sure].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["wrong_found"], (table < 0)[on & (label < 0.5)].mean(), rtol=1e-6)


def test_where_steps_end():
    """Line breaks are token 9. Prompt 9 1, then two steps and a stop; runs of breaks; a break before the stop; cut short; one step."""
    rows = [([9, 1, 2, 3, 9, 4, 5, 8], 2, [4, 7]), ([1, 2, 9, 9, 3, 8, 0, 0], 1, [3, 5]), ([1, 2, 9, 3, 9, 8, 0, 0], 1, [2, 5]), ([1, 2, 9, 3, 9, 0, 0, 0], 1, [2, 4]), ([1, 2, 8, 0, 0, 0, 0, 0], 1, [2])]
    tokens = np.array([t for t, *_ in rows], np.int32)
    mask = np.array([[t >= start and t <= ends[-1] for t in range(8)] for _, start, ends in rows], np.float32)
    got = np.asarray(jax.jit(reward.step_ends)(tokens, mask, np.arange(10) == 9))
    assert [np.flatnonzero(g).tolist() for g in got] == [ends for *_, ends in rows]


def test_aggregates():
    s = np.array([[9.0, 1.0, -2.0, 0.5], [-50.0, 3.0, 7.0, -9.0]], np.float32)
    ends = np.array([[0, 1, 1, 1], [0, 1, 0, 0]], np.float32)
    p = 1 / (1 + np.exp(-s.astype(np.float64)))
    want = {"min": [p[0, 2], p[1, 1]], "product": [p[0, 1] * p[0, 2] * p[0, 3], p[1, 1]], "last": [p[0, 3], p[1, 1]]}
    for name, f in reward.AGGREGATE.items():
        np.testing.assert_allclose(jax.jit(f)(s, ends), want[name], rtol=1e-5, err_msg=name)
