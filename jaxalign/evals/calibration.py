"""Does sigma(r_w - r_l) mean what it says? numpy in, Python floats out; f[N] chosen and rejected rewards, pair by pair."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from jaxalign.evals.stats import paired


class Calibration(NamedTuple):
    ece: float
    brier: float
    nll: float  # nats


class Bin(NamedTuple):
    """Pairs whose confidence lies in (low, high]."""

    low: float
    high: float
    confidence: float  # their mean confidence
    accuracy: float  # how many of them are right
    pairs: int


def calibration(chosen, rejected, *, bins: int = 10) -> Calibration:
    """All three are 0 for a sure and right reward, and small is good.

    ece = sum_m |B_m|/N |acc_m - conf_m| over equal-width bins (lo, hi] of the confidence sigma(|r_w - r_l|)
    (Guo et al. 1706.04599 eq. 3); brier = mean (1 - sigma(r_w - r_l))^2; nll = -mean log sigma(r_w - r_l).
    A tie has confidence 1/2 and is right half of the time: a constant reward is useless, yet calibrated.
    """
    d, _, right, confidence, of = _binned(chosen, rejected, bins)
    ece = np.abs(np.bincount(of, weights=right - confidence, minlength=bins)).sum() / len(d)
    return Calibration(float(ece), float(np.exp(-2 * np.logaddexp(0, d)).mean()), float(np.logaddexp(0, -d).mean()))


def reliability(chosen, rejected, *, bins: int = 10) -> list[Bin]:
    """The bins of `calibration` that hold a pair: what a reliability diagram draws. The lower half of them is empty by nature."""
    _, edges, right, confidence, of = _binned(chosen, rejected, bins)
    parts = [(k, of == k) for k in range(bins)]
    return [Bin(float(edges[k]), float(edges[k + 1]), float(confidence[at].mean()), float(right[at].mean()), int(at.sum())) for k, at in parts if at.any()]


def temperature(chosen, rejected) -> float:
    """T > 0 that minimises the nll of sigma((r_w - r_l) / T): divide rewards by it, and the order of answers stays (Guo et al.
    1706.04599, section 4.2). Fit it on held-out pairs, never on those that are then judged.

    The nll is convex in 1/T. inf where the rewards are wrong on average (no scale helps), 0 where no pair is wrong.
    """
    chosen, rejected = paired(chosen, rejected)
    d = chosen - rejected
    if not d.mean() > 0:
        return math.inf
    if not (d < 0).any():
        return 0.0
    scale = np.abs(d).max()
    d = d / scale
    slope = lambda s: -(d * np.exp(-np.logaddexp(0, s * d))).mean()  # of the nll in s = scale / T; from below 0 to above
    low, high = 0.0, 1.0
    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(200):  # to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(scale / high)


def _binned(chosen, rejected, bins: int):
    chosen, rejected = paired(chosen, rejected)
    d = chosen - rejected
    confidence = 1 / (1 + np.exp(-np.abs(d)))
    right = (d > 0) + 0.5 * (d == 0)
    of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return d, np.arange(bins + 1) / bins, right, confidence, of
