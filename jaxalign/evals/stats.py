"""Numbers about samples and pairs, each with its uncertainty. numpy in, Python floats out.

N outcomes or pairs, G prompts, K samples of one prompt. Nothing here guesses: empty input and NaN are refused
(ValueError), because a mean over them would be a number that nobody measured.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

# -- outcomes and their intervals -----------------------------------------------------------------------------------


def outcomes(a, b) -> np.ndarray:
    """f64[N]: 1 where a > b, 1/2 where they tie, 0 where a < b."""
    a, b = _paired(a, b)
    return (a > b) + 0.5 * (a == b)


def win_rate(a, b) -> float:
    """How often `a` beats `b`, f[N] each: (wins + ties / 2) / N."""
    return float(outcomes(a, b).mean())


def win_interval(a, b, groups=None, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The interval of `win_rate`: bootstrap over prompts; Wilson, counting prompts, where every prompt says the same."""
    won = outcomes(a, b)
    lo, hi = bootstrap(won, groups, level=level, seed=seed)
    if lo < hi:
        return lo, hi
    return wilson(float(won.mean()), len(won) if groups is None else len(np.unique(groups)), level=level)


def bootstrap(values, groups=None, *, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The percentile interval of the mean of `values` f[N] (Efron 1979), from `resamples` draws of G prompts out of G.

    `groups` [N] names each value's prompt: the values of a prompt are drawn together, for they are not independent.
    None: every value is a prompt of its own. Each draw's mean is (sum of the values) / (number of them).
    """
    values = _numbers(values)
    if groups is not None:
        _, of = np.unique(np.asarray(groups), return_inverse=True)
        if of.shape != values.shape:
            raise ValueError(f"{values.size} values, but groups has shape {of.shape}")
        sums, counts = np.bincount(of, weights=values), np.bincount(of)
    else:
        sums, counts = values, np.ones(len(values), int)
    rng, means = np.random.default_rng(seed), []
    rows = max(1, 2**22 // len(sums))  # draws at a time: at most 32 MiB of indices
    for begin in range(0, resamples, rows):
        drawn = rng.integers(0, len(sums), (min(rows, resamples - begin), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    lo, hi = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def wilson(rate: float, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a rate seen in n trials: where |rate - p| <= z sqrt(p (1-p) / n).

    (rate + z^2/2n -+ z sqrt(rate (1-rate) / n + z^2/4n^2)) / (1 + z^2/n). Never of zero width, never outside [0, 1].
    """
    if n < 1 or not 0 <= rate <= 1:
        raise ValueError(f"wilson needs n >= 1 and a rate in [0, 1]; got n={n}, rate={rate}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = rate + z * z / (2 * n)
    reach = z * math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)
    lo, hi = (centre - reach) / (1 + z * z / n), (centre + reach) / (1 + z * z / n)
    return (0.0 if rate == 0 else lo), (1.0 if rate == 1 else hi)  # exact there, but for rounding


# -- pairs ----------------------------------------------------------------------------------------------------------


def accuracy(chosen, rejected) -> float:
    """How often the chosen one scores higher, f[N] each. A tie counts as wrong, as in TRL's `accuracy`."""
    chosen, rejected = _paired(chosen, rejected)
    return float((chosen > rejected).mean())


class Calibration(NamedTuple):
    ece: float
    brier: float
    nll: float  # nats


def calibration(chosen, rejected, *, bins: int = 10) -> Calibration:
    """Does sigma(r_w - r_l) f[N] mean what it says? All three are 0 for a sure and right reward, and small is good.

    ece = sum_m |B_m|/N |acc_m - conf_m| over equal-width bins (lo, hi] of the confidence sigma(|r_w - r_l|)
    (Guo et al. 1706.04599 eq. 3); brier = mean (1 - sigma(r_w - r_l))^2; nll = -mean log sigma(r_w - r_l).
    A tie has confidence 1/2 and is right half of the time: a constant reward is useless, yet calibrated.
    """
    chosen, rejected = _paired(chosen, rejected)
    d = chosen - rejected
    confidence = 1 / (1 + np.exp(-np.abs(d)))
    right = (d > 0) + 0.5 * (d == 0)
    of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    ece = np.abs(np.bincount(of, weights=right - confidence, minlength=bins)).sum() / len(d)
    return Calibration(float(ece), float(np.exp(-2 * np.logaddexp(0, d)).mean()), float(np.logaddexp(0, -d).mean()))


def pearson(x, y) -> float:
    """Correlation of f[N] and f[N]; NaN where one of them is constant. Reward against length: an alarm for hacking."""
    x, y = _paired(x, y)
    # Exactly constant is asked for first: the mean of equal numbers may be an ulp off, and noise / noise is anything.
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1, 1))


# -- what is possible at a KL ---------------------------------------------------------------------------------------


def ess(log_weights) -> float:
    """Kish's effective sample size (sum w)^2 / sum w^2 of weights given as logs f[K], up to a constant."""
    w = _numbers(log_weights)
    w = np.exp(w - w.max())
    return float(w.sum() ** 2 / (w**2).sum())


class Tilted(NamedTuple):
    reward: float  # E_pi* r
    kl: float  # KL(pi* || pi), nats
    ess: float  # effective samples per prompt: the other two mean little unless it is well above 1


def tilted(rewards, beta: float) -> Tilted:
    """The policy that no other beats at its KL, pi*(y|x) = pi(y|x) exp(r(x, y) / beta) / Z(x), estimated from samples of pi.

    `rewards` f[K] of one prompt, or f[G,K]: weighed within each prompt (Z depends on x), then averaged over the prompts.
    With w = softmax(r / beta): reward = sum w r; kl = sum w r / beta - log mean exp(r / beta) (2305.18290 eq. 4).
    Self-normalised, so biased by O(1/K): kl cannot exceed log K, nor reward the best sample.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive; got {beta}")
    r = np.atleast_2d(_numbers(rewards, dimensions=(1, 2)))
    scaled = (r - r.max(1, keepdims=True)) / beta  # a shift of r per prompt changes neither w nor kl
    w = np.exp(scaled)
    mass = w.sum(1)
    kl = (w * scaled).sum(1) / mass - np.log(mass / r.shape[1])
    return Tilted(
        float(((w * r).sum(1) / mass).mean()),
        float(np.maximum(kl, 0).mean()),
        float((mass**2 / (w**2).sum(1)).mean()),
    )


def best_of_n_kl(n: int) -> float:
    """KL(best of n || pi) = log n - (n-1)/n, nats: exact where no two samples tie, else an upper bound (2401.01879)."""
    if n < 1:
        raise ValueError(f"best of n needs n >= 1; got {n}")
    return math.log(n) - (n - 1) / n


def best_of_n(proxy, gold, n: int) -> float:
    """E[gold of the best of n by proxy], without bias, from K >= n samples per prompt; f[K] or f[G,K] each.

    sum_{i=n..K} C(i-1, n-1) / C(K, n) gold_(i), samples in ascending order of the proxy (Nakano et al. 2112.09332 app. I).
    """
    shape = np.shape(proxy)
    proxy, gold = (np.atleast_2d(_numbers(x, dimensions=(1, 2))) for x in (proxy, gold))
    if proxy.shape != gold.shape or not 1 <= n <= proxy.shape[1]:
        raise ValueError(f"best of {n} needs proxy and gold of one shape with at least n samples per prompt; got {shape} and {gold.shape}")
    k = proxy.shape[1]
    # w_K = n/K and w_{i-1} = w_i (i-n) / (i-1): no binomial that overflows.
    i = np.arange(k, 1, -1)
    weights = np.cumprod(np.concatenate([[n / k], np.maximum(i - n, 0) / (i - 1)]))[::-1]
    # Ties keep the order of sampling, which knows nothing of gold: still without bias.
    order = np.argsort(proxy, axis=1, kind="stable")
    return float((np.take_along_axis(gold, order, 1) @ weights).mean())


def _numbers(x, dimensions: tuple[int, ...] = (1,)) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim not in dimensions or x.size == 0 or np.isnan(x).any():
        raise ValueError(f"expected numbers in {' or '.join(map(str, dimensions))} dimension(s), not empty and without NaN; got shape {x.shape}, {int(np.isnan(x).sum())} NaN")
    return x


def _paired(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = _numbers(a), _numbers(b)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} numbers against {b.size}: they must pair up")
    return a, b
