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
    a, b = paired(a, b)
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
    values = numbers(values)
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


def both_orders(first, second) -> np.ndarray:
    """f64[N]: 1 (A wins), 1/2 or 0 of a judge who was shown A first, and then B first; both arguments speak of A.

    Verdicts that differ are a tie: a judge who prefers what stands first has said nothing (Zheng et al. 2306.05685, section 3.4).
    """
    first, second = paired(first, second)
    return np.where(first == second, first, 0.5)


def position_bias(first, second) -> float:
    """Share of the pairs of `both_orders` whose two verdicts differ."""
    first, second = paired(first, second)
    return float((first != second).mean())


class Wins(NamedTuple):
    win_rate: float  # a tie is half a win
    win_interval: tuple[float, float]
    wins: int
    ties: int
    losses: int
    win_rate_without_ties: float  # NaN where all are ties
    sign_p: float  # of `sign_test`


def wins(a, b, groups=None, *, level: float = 0.95, seed: int = 0) -> Wins:
    """All that is said of `a` against `b`, f[N] each (scores; or outcomes of `a`, against 1/2 everywhere)."""
    won = outcomes(a, b)
    w, l = int((won == 1).sum()), int((won == 0).sum())
    without = w / (w + l) if w + l else math.nan
    return Wins(win_rate(a, b), win_interval(a, b, groups, level=level, seed=seed), w, len(won) - w - l, l, without, sign_test(a, b))


def sign_test(a, b) -> float:
    """Two-sided p-value of "neither is better", from what is no tie: 2 P(X <= min(wins, losses)), X ~ Binomial(n, 1/2), at most 1."""
    won = outcomes(a, b)
    w, l = int((won == 1).sum()), int((won == 0).sum())
    tail, term = 0, 1
    for i in range(min(w, l) + 1):  # exact, in whole numbers: C(n, i)
        tail += term
        term = term * (w + l - i) // (i + 1)
    return min(1.0, 2 * tail / 2 ** (w + l))


def paired_difference(a, b, groups=None, *, level: float = 0.95, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """(mean of a - b, its interval) of f[N] each: every draw takes the same prompts for both systems."""
    a, b = paired(a, b)
    return float((a - b).mean()), bootstrap(a - b, groups, level=level, seed=seed)


# -- pairs ----------------------------------------------------------------------------------------------------------


def accuracy(chosen, rejected) -> float:
    """How often the chosen one scores higher, f[N] each. A tie counts as wrong, as in TRL's `accuracy`."""
    chosen, rejected = paired(chosen, rejected)
    return float((chosen > rejected).mean())


def pearson(x, y) -> float:
    """Correlation of f[N] and f[N]; NaN where one of them is constant. Reward against length: an alarm for hacking."""
    x, y = paired(x, y)
    # Exactly constant is asked for first: the mean of equal numbers may be an ulp off, and noise / noise is anything.
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1, 1))


def spearman(x, y) -> float:
    """`pearson` of the ranks of f[N] and f[N], equal numbers sharing the mean of theirs."""
    return pearson(*map(_ranks, paired(x, y)))


def _ranks(x: np.ndarray) -> np.ndarray:
    _, of, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[of]


# -- what is possible at a KL ---------------------------------------------------------------------------------------


def ess(log_weights) -> float:
    """Kish's effective sample size (sum w)^2 / sum w^2 of weights given as logs f[K], up to a constant."""
    w = numbers(log_weights)
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
    r = np.atleast_2d(numbers(rewards, dimensions=(1, 2)))
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
    proxy, gold = (np.atleast_2d(numbers(x, dimensions=(1, 2))) for x in (proxy, gold))
    if proxy.shape != gold.shape or not 1 <= n <= proxy.shape[1]:
        raise ValueError(f"best of {n} needs proxy and gold of one shape with at least n samples per prompt; got {shape} and {gold.shape}")
    k = proxy.shape[1]
    # w_K = n/K and w_{i-1} = w_i (i-n) / (i-1): no binomial that overflows.
    i = np.arange(k, 1, -1)
    weights = np.cumprod(np.concatenate([[n / k], np.maximum(i - n, 0) / (i - 1)]))[::-1]
    # Ties keep the order of sampling, which knows nothing of gold: still without bias.
    order = np.argsort(proxy, axis=1, kind="stable")
    return float((np.take_along_axis(gold, order, 1) @ weights).mean())


def numbers(x, dimensions: tuple[int, ...] = (1,)) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim not in dimensions or x.size == 0 or np.isnan(x).any():
        raise ValueError(f"expected numbers in {' or '.join(map(str, dimensions))} dimension(s), not empty and without NaN; got shape {x.shape}, {int(np.isnan(x).sum())} NaN")
    return x


def paired(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = numbers(a), numbers(b)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} numbers against {b.size}: they must pair up")
    return a, b
