"""Calibration and agreement against loops, closed forms and brute force."""

import math

import numpy as np
import pytest

from jaxalign.evals import agreement, calibration


def test_calibration_against_a_loop():
    rng = np.random.default_rng(2)
    w, l = rng.normal(0.5, 2, 500), rng.normal(0, 2, 500)
    w[:20] = l[:20]
    sigma = [1 / (1 + math.exp(-(a - b))) for a, b in zip(w, l)]
    bins = {}
    for a, b, p in zip(w, l, sigma):
        conf, right = max(p, 1 - p), 1.0 if a > b else 0.5 if a == b else 0.0
        bins.setdefault(math.ceil(conf * 10), []).append((right, conf))
    ece = sum(len(x) / 500 * abs(np.mean([r for r, _ in x]) - np.mean([c for _, c in x])) for x in bins.values())
    got = calibration.calibration(w, l)
    assert got.ece == pytest.approx(ece)
    # Brier and NLL are of the statement "chosen wins", which is always true
    assert got.brier == pytest.approx(np.mean([(1 - p) ** 2 for p in sigma]))
    assert got.nll == pytest.approx(np.mean([-math.log(p) for p in sigma]))


def test_calibration_extremes():
    # Right with margin log 3, i.e. confidence 3/4, in 3 of 4 pairs: calibrated. Brier 3/4 (1/4)^2 + 1/4 (3/4)^2 = 3/16.
    d = math.log(3) * np.array([1, 1, 1, -1])
    got = calibration.calibration(d, 0 * d)
    assert got.ece == pytest.approx(0, abs=1e-15) and got.brier == pytest.approx(3 / 16)
    assert calibration.calibration([1000.0], [0.0]) == (0, 0, 0)
    assert calibration.calibration([0.0], [1000.0]) == (1, 1, 1000)  # sure and wrong; nothing overflows
    assert calibration.calibration([2.0], [2.0]) == pytest.approx((0, 0.25, math.log(2)))


def test_reliability_is_what_ece_sums():
    rng = np.random.default_rng(0)
    d = rng.normal(0.5, 2, 400)
    bins = calibration.reliability(d, 0 * d)
    assert sum(b.pairs for b in bins) == 400 and all(0.5 <= b.confidence and b.low < b.confidence <= b.high for b in bins)
    assert sum(b.pairs / 400 * abs(b.accuracy - b.confidence) for b in bins) == pytest.approx(calibration.calibration(d, 0 * d).ece)


def test_temperature_is_the_best_of_a_grid():
    rng = np.random.default_rng(1)
    true = rng.normal(0, 1.5, 4000)
    d = 3.0 * np.where(rng.random(4000) < 1 / (1 + np.exp(-true)), true, -true)  # chosen by a coin of sigma(true), then said three times too loud
    t = calibration.temperature(d, 0 * d)
    nll = lambda t: np.logaddexp(0, -d / t).mean()
    assert nll(t) <= min(nll(g) for g in np.geomspace(0.5, 20, 2000)) + 1e-12
    assert t == pytest.approx(3.0, rel=0.1)
    assert calibration.temperature(1e6 * d, 0 * d) == pytest.approx(1e6 * t)
    assert calibration.temperature([1.0, 2.0], [0, 0]) == 0 and math.isinf(calibration.temperature([1.0, -2.0], [0, 0]))


def test_parts_and_their_mean():
    got = agreement.by_group([1, 2, 0, 5], [0, 2, 1, 1], ["chat", "chat", "code", "code"])
    assert got["chat"].accuracy == 0.75 and got["chat"].tie_rate == 0.5 and got["code"].accuracy == 0.5 and list(got) == ["chat", "code"]
    # the mean of 1 (once) and 1/3 (three pairs) is 2/3, whatever their sizes
    assert agreement.mean_of_parts(agreement.by_group([1, 1, 0, 0], [0, 0, 1, 1], list("abbb"))) == pytest.approx(2 / 3)


def test_kappas():
    # Cohen 1960's scheme by hand: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no. p_o = 35/50; p_e = (25*30 + 25*20) / 2500 = 1/2; 0.2 / 0.5
    a, b = "y" * 25 + "n" * 25, "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15
    assert agreement.cohen_kappa(a, b) == pytest.approx(0.4)
    assert agreement.cohen_kappa("aab", "aab") == 1 and math.isnan(agreement.cohen_kappa("aa", "aa"))
    # Fleiss 1971 by the definition: the share of agreeing pairs of labellers in each row, against chance
    counts = np.array([[0, 3], [2, 1], [3, 0], [1, 2], [3, 0]])
    agree = np.mean([(n * (n - 1)).sum() / 6 for n in counts])
    p = counts.sum(0) / 15
    assert agreement.fleiss_kappa(counts) == pytest.approx((agree - (p**2).sum()) / (1 - (p**2).sum()))
    assert agreement.fleiss_kappa([[2, 0], [0, 2]]) == 1
    # labellers who toss coins agree no more than chance
    coins = np.random.default_rng(0).binomial(5, 0.3, 4000)
    assert abs(agreement.fleiss_kappa(np.stack([coins, 5 - coins], 1))) < 0.02
    with pytest.raises(ValueError, match="same number"):
        agreement.fleiss_kappa([[2, 0], [1, 0]])
