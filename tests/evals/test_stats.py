"""Closed forms, brute force and plain loops against `evals.stats`."""

import itertools
import math
import time

import numpy as np
import pytest

from jaxalign.evals import stats


def test_win_rate_counts_ties_half():
    # one win, one tie, one loss, one win: (1 + 1/2 + 0 + 1) / 4
    assert stats.win_rate([2, 1, 0, 5], [1, 1, 1, -5]) == 0.625
    assert stats.win_rate([1, 2], [2, 1]) + stats.win_rate([2, 1], [1, 2]) == 1


def test_bootstrap_is_the_plain_loop():
    rng = np.random.default_rng(1)
    values, groups = rng.normal(size=23), rng.integers(0, 7, 23)
    names = np.unique(groups)
    draws = np.random.default_rng(5).integers(0, len(names), (1000, len(names)))
    means = [np.concatenate([values[groups == names[j]] for j in row]).mean() for row in draws]
    expect = np.quantile(means, [0.025, 0.975])
    np.testing.assert_allclose(stats.bootstrap(values, groups, resamples=1000, seed=5), expect, rtol=1e-12)
    assert stats.bootstrap(values, groups, seed=5) == stats.bootstrap(values, [f"p{g}" for g in groups], seed=5)


def test_bootstrap_covers_and_resamples_prompts_together():
    # Standard error of a mean of 400 coin flips: 1/2 / 20 = 0.025, so the interval is about 2 * 1.96 * 0.025 = 0.098 wide.
    flips = np.random.default_rng(0).permutation(np.repeat([0.0, 1.0], 200))
    lo, hi = stats.bootstrap(flips)
    assert lo < 0.5 < hi and hi - lo == pytest.approx(0.098, rel=0.06)
    # Every flip written down 16 times is no new evidence: the same width with groups, 4 times narrower without.
    copies, prompts = np.repeat(flips, 16), np.repeat(np.arange(400), 16)
    assert np.ptp(stats.bootstrap(copies, prompts)) == pytest.approx(0.098, rel=0.06)
    assert np.ptp(stats.bootstrap(copies)) == pytest.approx(0.098 / 4, rel=0.06)


def test_bootstrap_in_pieces_is_the_whole():
    # 3000 prompts x 2000 draws do not fit into one piece of 2^22 indices.
    values = np.random.default_rng(0).normal(size=3000)
    draws = np.random.default_rng(0).integers(0, 3000, (2000, 3000))
    np.testing.assert_allclose(stats.bootstrap(values), np.quantile(values[draws].mean(1), [0.025, 0.975]), rtol=1e-12)


def test_bootstrap_of_many_pairs_is_quick():
    values = np.random.default_rng(0).random(20_000)
    begin = time.perf_counter()
    stats.bootstrap(values, np.arange(20_000) // 2, resamples=1000)
    assert time.perf_counter() - begin < 5


def test_wilson_solves_its_own_equation():
    # The ends are the p at which the observed rate is exactly z standard errors away.
    for rate, n in [(0.3, 10), (0.5, 1), (0.97, 250)]:
        for p in stats.wilson(rate, n):
            assert abs(rate - p) == pytest.approx(1.959963984540054 * math.sqrt(p * (1 - p) / n))
    # At rate 1 the equation is linear: lo = n / (n + z^2) = 20 / (20 + 3.8415) = 0.8389
    lo, hi = stats.wilson(1.0, 20)
    assert hi == 1 and lo == pytest.approx(0.8389, abs=1e-4)
    assert stats.wilson(0.0, 20) == pytest.approx((0, 1 - lo))


def test_win_interval_never_claims_certainty():
    ones = np.ones(40)
    # 40 wins out of 40, but only 10 prompts: Wilson with n = 10
    assert stats.win_interval(ones, 0 * ones, np.arange(40) // 4) == stats.wilson(1.0, 10)
    assert stats.win_interval(ones, ones) == stats.wilson(0.5, 40)
    a = np.arange(40.0)
    assert stats.win_interval(a, a[::-1]) == stats.bootstrap(stats.outcomes(a, a[::-1]))


def test_accuracy_counts_ties_as_wrong():
    assert stats.accuracy([1, 2, 3, 4], [0, 2, 9, 3]) == 0.5


def test_pearson():
    x = np.random.default_rng(0).normal(size=50)
    assert stats.pearson(x, 3 - 2 * x) == pytest.approx(-1)
    y = np.random.default_rng(1).normal(size=50)
    assert stats.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert math.isnan(stats.pearson(x, np.full(50, 0.1)))  # the mean of fifty 0.1 is not exactly 0.1


def test_ess():
    assert stats.ess(np.full(7, -300.0)) == pytest.approx(7)
    assert stats.ess([0.0, -1e9]) == 1
    # weights 1 and 3: 16 / 10
    assert stats.ess([1000, 1000 + math.log(3)]) == pytest.approx(1.6)


def test_tilted_is_exact_on_an_enumerated_policy():
    # Samples 0, 0, 0, 1 are pi = (3/4, 1/4); with beta = 1/log 3 the tilt multiplies the 1 by 3: pi* = (1/2, 1/2).
    # KL = 1/2 log(1/2 / 3/4) + 1/2 log(1/2 / 1/4) = 1/2 log(4/3); weights 1, 1, 1, 3: ess = 36 / 12
    got = stats.tilted([0, 0, 0, 1], 1 / math.log(3))
    assert got == pytest.approx((0.5, 0.5 * math.log(4 / 3), 3))
    # A prompt whose rewards are 100 higher has the same weights: prompts are never weighed against one another.
    both = stats.tilted([[0, 0, 0, 1], [100, 100, 100, 101]], 1 / math.log(3))
    assert both == pytest.approx((50.5, 0.5 * math.log(4 / 3), 3))


def test_tilted_of_a_gaussian_reward():
    # r ~ N(0, 1) under pi: under pi*, r ~ N(1/beta, 1), KL = 1 / (2 beta^2), ess/K = exp(-1/beta^2).
    r = np.random.default_rng(0).normal(size=400_000)
    got = stats.tilted(r, 2.0)
    assert got.reward == pytest.approx(0.5, abs=0.01)
    assert got.kl == pytest.approx(0.125, abs=0.004)
    assert got.ess / 400_000 == pytest.approx(math.exp(-0.25), abs=0.01)


def test_tilted_limits():
    r = [0.0, 1.0, 5.0]
    assert stats.tilted(r, 1e9) == pytest.approx((2, 0, 3), abs=1e-6)
    assert stats.tilted(r, 1e-4) == pytest.approx((5, math.log(3), 1))  # only the best sample is left
    values = [stats.tilted(r, b) for b in np.geomspace(0.1, 10, 20)]
    assert all(a.reward > b.reward and a.kl > b.kl for a, b in itertools.pairwise(values))


def test_no_policy_beats_the_tilted_one():
    # Any reweighting with the same KL has no more reward: that is what makes it the frontier.
    rng = np.random.default_rng(0)
    r = rng.normal(size=6)
    best = stats.tilted(r, 0.7)
    for _ in range(2000):
        q = rng.dirichlet(np.ones(6))
        assert q @ r - 0.7 * (q @ np.log(q * 6)) <= best.reward - 0.7 * best.kl + 1e-12


def test_best_of_n_against_all_subsets():
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=8), rng.normal(size=8)
    for n in range(1, 9):
        subsets = list(itertools.combinations(range(8), n))
        expect = np.mean([gold[max(s, key=lambda i: proxy[i])] for s in subsets])
        assert stats.best_of_n(proxy, gold, n) == pytest.approx(expect)
    assert stats.best_of_n([proxy, -proxy], [gold, gold], 3) == pytest.approx((stats.best_of_n(proxy, gold, 3) + stats.best_of_n(-proxy, gold, 3)) / 2)
    assert math.isfinite(stats.best_of_n(np.arange(5000.0), np.arange(5000.0), 2500))


def test_best_of_n_kl_by_integration():
    # With u the quantile of the sample, best of n has density n u^(n-1): KL = integral of f log f.
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (1, 2, 16):
        f = n * u ** (n - 1)
        assert stats.best_of_n_kl(n) == pytest.approx(np.mean(f * np.log(f)), abs=1e-4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.win_rate([], []),
        lambda: stats.win_rate([1.0, math.nan], [0, 0]),
        lambda: stats.win_rate([1, 2], [1]),
        lambda: stats.bootstrap([1, 2], groups=[1]),
        lambda: stats.bootstrap([1, 2], groups=[[1], [2]]),
        lambda: stats.tilted([1, 2], 0),
        lambda: stats.best_of_n([1, 2], [1, 2], 3),
        lambda: stats.best_of_n([1, 2], [1, 2], 0),
        lambda: stats.best_of_n_kl(0),
        lambda: stats.wilson(0.5, 0),
    ],
)
def test_what_was_not_measured_is_refused(call):
    with pytest.raises(ValueError):
        call()


def test_sign_test_and_orders():
    # 8 wins, 1 tie, 2 losses: 2 (C(10,0) + C(10,1) + C(10,2)) / 2^10 = 112 / 1024
    a = np.array([1] * 8 + [0] + [-1] * 2)
    assert stats.sign_test(a, 0 * a) == 112 / 1024 and stats.sign_test([1.0], [1.0]) == 1 and stats.sign_test([1, -1], [0, 0]) == 1
    assert 0 < stats.sign_test(np.ones(1000), np.zeros(1000)) < 1e-300  # 2^-999: whole numbers do not underflow
    got = stats.wins(a, 0 * a)
    assert (got.wins, got.ties, got.losses) == (8, 1, 2) and got.win_rate == 8.5 / 11 and got.win_rate_without_ties == 0.8
    first, second = [1, 1, 0, 0.5, 1], [1, 0, 0, 0.5, 0.5]
    assert stats.both_orders(first, second).tolist() == [1, 0.5, 0, 0.5, 0.5] and stats.position_bias(first, second) == pytest.approx(2 / 5)


def test_paired_difference_cancels_what_prompts_share():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 200)
    mean, (lo, hi) = stats.paired_difference(hard + 1 + 0.1 * rng.normal(size=200), hard)
    assert mean == pytest.approx(1, abs=0.05) and 0.9 < lo < mean < hi < 1.1


def test_spearman():
    x = np.random.default_rng(0).normal(size=40)
    assert stats.spearman(x, np.exp(x)) == pytest.approx(1) and stats.spearman(x, -(x**3)) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4
    assert stats.spearman([0, 7, 7, 9], [1, 2, 3, 4]) == pytest.approx(stats.pearson([1, 2.5, 2.5, 4], [1, 2, 3, 4]))
