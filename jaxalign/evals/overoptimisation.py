"""How far from where it began did a policy go, and what did that bring? Points of (KL in nats, reward), numpy in, numbers out."""

from __future__ import annotations

import math
from typing import NamedTuple, Sequence

import numpy as np

from jaxalign.evals.stats import best_of_n, best_of_n_kl, paired


class Fit(NamedTuple):
    """R(d) = d (a - b d) of best of n, or d (a - b log d) of reinforcement learning, in d = sqrt(KL)."""

    a: float
    b: float
    r2: float  # share of the variance around the mean that the form explains; NaN where there is none
    turnover: float  # the KL at which R is highest; inf where b <= 0: it rises as far as was seen
    peak: float  # R there


def fit_best_of_n(kl, reward) -> Fit:
    """R(d) = d (a - b d), by least squares over f[N] points (Gao et al. 2210.10760, eq. 1); highest at d = a / 2b.

    reward: less that of the policy at KL 0, where the form is 0. Points at KL 0 say nothing, and are left out.
    """
    d, r = _distance(kl, reward)
    a, b, r2 = _least_squares(np.stack([d, -d * d], 1), r)
    top = a / (2 * b) if b > 0 else math.inf
    return Fit(a, b, r2, top * top if top > 0 else 0.0, math.inf if math.isinf(top) else max(0.0, a * a / (4 * b) if a > 0 else 0.0))


def fit_rl(kl, reward) -> Fit:
    """R(d) = d (a - b log d), as `fit_best_of_n`; highest at d = exp(a/b - 1), where it is b d."""
    d, r = _distance(kl, reward)
    return _rl(*_least_squares(np.stack([d, -d * np.log(d)], 1), r))


def fit_rl_and_start(kl, reward) -> tuple[float, Fit]:
    """(R0, fit) of R0 + d (a - b log d), where nobody measured the reward at KL 0: three constants, so points at four KLs or more.
    `Fit.peak` is what the policy won over R0."""
    kl, reward = paired(kl, reward)
    if (kl < 0).any() or len(np.unique(kl)) < 4:
        raise ValueError(f"three constants need points at four different KLs, none of them negative; got {len(np.unique(kl))}, from {kl.min():g} on")
    d = np.sqrt(kl)
    start, *ab, r2 = _least_squares(np.stack([np.ones_like(d), d, -d * np.log(np.where(d > 0, d, 1.0))], 1), reward)
    return start, _rl(*ab, r2)


def _rl(a: float, b: float, r2: float) -> Fit:
    top = math.exp(min(a / b - 1, 300.0)) if b > 0 else math.inf
    return Fit(a, b, r2, top * top, b * top if b > 0 else math.inf)


def best_of_n_form(fit: Fit, kl) -> np.ndarray:
    """R at f[N] KLs."""
    d = np.sqrt(np.asarray(kl, float))
    return d * (fit.a - fit.b * d)


def rl_form(fit: Fit, kl) -> np.ndarray:
    """R at f[N] KLs; 0 at 0, its limit."""
    d = np.sqrt(np.asarray(kl, float))
    return d * (fit.a - fit.b * np.log(np.where(d > 0, d, 1.0)))


def best_of_n_points(proxy, gold, ns: Sequence[int]) -> list[tuple[float, float]]:
    """(analytic KL, unbiased gold reward) of the best of each n by `proxy`, from f[G,K] samples of the start with K >= max(ns)."""
    return [(best_of_n_kl(n), best_of_n(proxy, gold, n)) for n in ns]


class Turn(NamedTuple):
    """Of a policy's way, point after point, each the mean with its two neighbours: a peak of one noisy evaluation is none."""

    at: int  # index of the highest point
    kl: float
    reward: float
    end_kl: float
    end_reward: float
    noise: float  # standard deviation of a single point around its neighbours
    turned: bool  # it lost more by the end than three times the noise, which fewer than four points do not show


def turn(kl, reward) -> Turn:
    """Where the reward was highest, and whether it fell from there; kl and reward f[N] in the order of training."""
    kl, reward = paired(kl, reward)
    soft = smooth(reward)
    at = int(soft.argmax())
    # A point less the mean of itself and both neighbours has 2/3 of a point's variance.
    noise = float(np.sqrt(np.mean((reward - soft)[1:-1] ** 2) * 1.5)) if len(soft) > 2 else 0.0
    return Turn(at, float(kl[at]), float(soft[at]), float(kl[-1]), float(soft[-1]), noise, len(soft) > 3 and bool(soft[at] - soft[-1] > 3 * noise))


def smooth(y) -> np.ndarray:
    """The mean of each of f[N] points with its neighbours; the first and the last stand for one that is not there."""
    wide = np.concatenate([y[:1], y, y[-1:]])
    return (wide[:-2] + wide[1:-1] + wide[2:]) / 3


def running_maximum(kl, reward) -> list[tuple[float, float]]:
    """The most that any point up to each KL earned: what one would keep, checkpoint by checkpoint. In order of KL."""
    kl, reward = paired(kl, reward)
    order = np.lexsort((reward, kl))
    best = np.maximum.accumulate(reward[order])
    return list(zip(kl[order].tolist(), best.tolist()))


def hull(kl, reward) -> list[tuple[float, float]]:
    """Corners of the least concave line over the points, from the least KL to the point with most reward: what a mixture of
    these policies (a coin before each prompt) reaches at most, for a mixture's KL is no more than the mean of theirs."""
    kl, reward = paired(kl, reward)
    out: list[tuple[float, float]] = []
    for x, y in sorted(zip(kl.tolist(), reward.tolist())):
        if out and x == out[-1][0]:
            out.pop()  # sorted: the later one is higher
        while len(out) > 1 and (out[-1][1] - out[-2][1]) * (x - out[-2][0]) <= (y - out[-2][1]) * (out[-1][0] - out[-2][0]):
            out.pop()
        out.append((x, y))
    return out[: 1 + max(range(len(out)), key=lambda i: (out[i][1], -i))]


def _distance(kl, reward):
    kl, reward = paired(kl, reward)
    if (kl < 0).any():
        raise ValueError(f"a KL of {kl.min():g} nats: a divergence is not negative; average over more samples, or take k3")
    d, r = np.sqrt(kl[kl > 0]), reward[kl > 0]
    if len(np.unique(d)) < 2:
        raise ValueError("a form with two constants needs points at two different KLs above 0")
    return d, r


def _least_squares(x, y):
    """The constants, and the share of the variance that they explain."""
    constants, *_ = np.linalg.lstsq(x, y, rcond=None)
    total = ((y - y.mean()) ** 2).sum()
    return *map(float, constants), float(1 - ((y - x @ constants) ** 2).sum() / total) if total > 0 else math.nan
