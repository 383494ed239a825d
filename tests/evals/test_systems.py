"""Strengths of several systems; frontiers and over-optimisation forms; pass@k: against brute force and what made the data."""

import itertools
import math

import numpy as np
import pytest

from jaxalign.evals import overoptimisation as over
from jaxalign.evals import passes, stats, tournament


def test_two_systems_have_the_log_odds():
    theta = tournament.bradley_terry([[0, 30], [10, 0]])
    assert theta[0] - theta[1] == pytest.approx(math.log(3)) and theta.sum() == pytest.approx(0)
    assert np.diff(tournament.elo([0.0, math.log(10)])) == pytest.approx(400) and tournament.elo(theta).mean() == pytest.approx(1000)


def test_the_likelihood_is_highest_there():
    rng = np.random.default_rng(0)
    true = np.array([1.0, 0.2, -0.3, -0.9])
    a, b = rng.integers(0, 4, (2, 4000))
    a, b = a[a != b], b[a != b]
    won = (rng.random(len(a)) < 1 / (1 + np.exp(true[b] - true[a]))).astype(float)
    won[:100] = 0.5
    wins = tournament.table(a, b, won, 4)
    assert wins.sum() == pytest.approx(len(a)) and wins[0, 1] == won[(a == 0) & (b == 1)].sum() + (1 - won[(a == 1) & (b == 0)]).sum()
    theta = tournament.bradley_terry(wins)
    value = lambda t: -(wins * np.log1p(np.exp(t[None] - t[:, None]))).sum()
    assert all(value(theta) >= value(theta + 1e-3 * rng.normal(size=4)) for _ in range(100))
    np.testing.assert_allclose(theta, true, atol=0.15)


def test_who_never_lost_has_no_finite_strength():
    with pytest.raises(ValueError, match="prior"):
        tournament.bradley_terry([[0, 5, 1], [0, 0, 1], [0, 1, 0]])
    theta = tournament.bradley_terry([[0, 5], [0, 0]], prior=1.0)
    assert theta[0] - theta[1] == pytest.approx(math.log(5.5 / 0.5))  # one tie more


@pytest.mark.parametrize("fit, form, a, b, top", [(over.fit_best_of_n, over.best_of_n_form, 1.2, 0.3, (1.2 / 0.6) ** 2), (over.fit_rl, over.rl_form, 1.1, 0.5, math.exp(2.2 - 1) ** 2)])
def test_forms_are_found_again(fit, form, a, b, top):
    kl = np.linspace(0, 30, 40)
    made = form(over.Fit(a, b, 0, 0, 0), kl)
    got = fit(kl, made)
    assert (got.a, got.b, got.r2) == pytest.approx((a, b, 1)) and got.turnover == pytest.approx(top)
    fine = form(got, np.linspace(0.5 * top, 1.5 * top, 1001))
    assert fine.argmax() == 500 and got.peak == pytest.approx(fine.max(), rel=1e-6)
    noisy = made + np.random.default_rng(0).normal(0, 0.1, 40)
    with_noise, x = fit(kl, noisy), kl[1:]
    error = lambda f: ((form(f, x) - noisy[1:]) ** 2).sum()
    assert all(error(with_noise) <= error(with_noise._replace(a=with_noise.a + da, b=with_noise.b + db)) for da, db in itertools.product((-0.01, 0, 0.01), repeat=2))
    assert with_noise.r2 == pytest.approx(1 - error(with_noise) / ((noisy[1:] - noisy[1:].mean()) ** 2).sum())


def test_a_line_that_only_rises_has_no_turnover():
    kl = np.linspace(1, 9, 9)
    assert math.isinf(over.fit_best_of_n(kl, np.sqrt(kl) * (1 + 0.1 * np.sqrt(kl))).turnover)
    for bad in (lambda: over.fit_rl([-1.0, 2], [0, 1]), lambda: over.fit_rl([4.0, 4, 0], [1, 1, 0])):
        with pytest.raises(ValueError):
            bad()


def test_running_maximum_and_hull():
    kl, r = [3, 1, 2, 4, 0], [2.0, 1.5, 1.0, 1.9, 0.0]
    assert over.running_maximum(kl, r) == [(0, 0.0), (1, 1.5), (2, 1.5), (3, 2.0), (4, 2.0)]
    assert over.hull(kl, r) == [(0, 0.0), (1, 1.5), (3, 2.0)]
    rng = np.random.default_rng(0)
    kl, r = rng.random(30), rng.random(30)
    corners = over.hull(kl, r)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(corners)]
    assert slopes == sorted(slopes, reverse=True) and slopes[-1] >= 0 and corners[-1][1] == r.max() and corners[0][0] == kl.min()
    x, y = zip(*corners)
    inside = kl <= x[-1]
    assert (r[inside] <= np.interp(kl[inside], x, y) + 1e-12).all()


def test_best_of_n_points():
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(3, 8)), rng.normal(size=(3, 8))
    points = over.best_of_n_points(proxy, gold, (1, 4))
    assert points[0] == (0.0, pytest.approx(gold.mean())) and points[1] == (stats.best_of_n_kl(4), stats.best_of_n(proxy, gold, 4))


def test_pass_at_k_against_all_subsets():
    rng = np.random.default_rng(0)
    correct = (rng.random((5, 6)) < 0.3).astype(float)
    correct[0], correct[1] = 0, 1
    for k in range(1, 7):
        subsets = list(itertools.combinations(range(6), k))
        assert passes.pass_at_k(correct, k) == pytest.approx(np.mean([[row[list(s)].any() for s in subsets] for row in correct]))
    assert passes.pass_at_k(correct, 1) == pytest.approx(correct.mean())
    assert passes.pass_at_k(np.eye(1, 2000), 1000) == pytest.approx(0.5)  # no binomial overflows
    with pytest.raises(ValueError):
        passes.pass_at_k(correct, 7)


def test_majority_votes():
    assert passes.majority(["b", "a", "a", "b"]) == "b" and passes.majority([None, None, "7"]) == "7" and passes.majority([None]) is None
    answers = [["1", "2", "2"], ["3", "3", "4"], [None, None, None]]
    correct = [[a == r for a in row] for row, r in zip(answers, ["2", "3", "9"])]
    assert passes.maj_at_k(answers, correct, 3) == pytest.approx(2 / 3) and passes.maj_at_k(answers, correct, 1) == pytest.approx(1 / 3)


def test_exact_match():
    assert passes.exact_match("  The  answer.\n", "the answer") == 1 and passes.exact_match("42", ["41", "42"]) == 1 and passes.exact_match("4 2", "42") == 0
