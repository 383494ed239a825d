"""Several systems, compared pair by pair: strengths, and their ratings. S systems, N comparisons."""

from __future__ import annotations

import math

import numpy as np


def table(first, second, outcome, systems: int) -> np.ndarray:
    """f64[S,S]: how often i beat j, from N comparisons. first, second i[N]: who met; outcome f[N] of the first: 1, 1/2 or 0."""
    out = np.zeros((systems, systems))
    outcome = np.asarray(outcome, float)
    np.add.at(out, (first, second), outcome)
    np.add.at(out, (second, first), 1 - outcome)
    return out


def bradley_terry(wins, *, prior: float = 0.0) -> np.ndarray:
    """f64[S], mean 0: the strengths th that maximise sum_ij wins_ij log sigma(th_i - th_j) (Bradley and Terry 1952), by Newton.

    wins f[S,S]: how often i beat j, half of a tie to each. prior: so many ties more between every two systems; without them a
    system that always won has no finite strength (ValueError).
    """
    wins = np.array(wins, float)
    s = len(wins)
    if wins.shape != (s, s) or s < 2 or not np.isfinite(wins).all() or (wins < 0).any():
        raise ValueError(f"wins must be a square of finite counts of two systems or more, not {wins.shape}")
    wins = wins + prior / 2
    np.fill_diagonal(wins, 0)
    reach = np.linalg.matrix_power(np.eye(s) + (wins > 0), s) > 0
    if not reach.all():
        raise ValueError("some systems never lost to the others: their strengths have no finite estimate; more comparisons, or a prior")
    met, theta = wins + wins.T, np.zeros(s)
    value = lambda t: -(wins * np.logaddexp(0, t[None, :] - t[:, None])).sum()
    for _ in range(200):
        p = 1 / (1 + np.exp(theta[None, :] - theta[:, None]))  # i beats j
        slope = (wins - met * p).sum(1)
        curve = met * p * (1 - p)
        curve = np.diag(curve.sum(1)) - curve + 1 / s  # + 1 1'/S: strengths have no origin of their own
        move, rate = np.linalg.solve(curve, slope), 1.0
        while value(theta + rate * move) < value(theta) and rate > 1e-9:  # Newton alone may leap too far
            rate /= 2
        theta = theta + rate * move
        if np.abs(move).max() < 1e-12:
            break
    return theta - theta.mean()


def elo(strengths, *, anchor: float = 1000.0) -> np.ndarray:
    """Strengths on the scale of chess: 400 points are odds of ten to one; their mean is `anchor`."""
    strengths = np.asarray(strengths, float)
    return anchor + (strengths - strengths.mean()) * 400 / math.log(10)
