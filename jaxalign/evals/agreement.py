"""Do labellers agree with one another, and a reward model with them, here and there? numpy in, Python numbers out."""

from __future__ import annotations

import math
from typing import Hashable, NamedTuple, Sequence


from jaxalign.evals.stats import numbers, outcomes, wilson


class Part(NamedTuple):
    accuracy: float  # a tie is half right
    interval: tuple[float, float]  # Wilson
    tie_rate: float
    pairs: int


def by_group(chosen, rejected, groups: Sequence[Hashable]) -> dict[Hashable, Part]:
    """Accuracy of rewards f[N] for each value of `groups` [N]: the labellers' rating (a model should be surest where they
    are: Llama 2, 2307.09288, table 8), or the subset that a pair is from. In the order in which they first stand there."""
    right = outcomes(chosen, rejected)
    if len(groups) != len(right):
        raise ValueError(f"{len(right)} pairs, but {len(groups)} groups")
    out = {}
    for g in dict.fromkeys(groups):
        part = right[[x == g for x in groups]]
        out[g] = Part(float(part.mean()), wilson(float(part.mean()), len(part)), float((part == 0.5).mean()), len(part))
    return out


def mean_of_parts(parts: dict[Hashable, Part]) -> float:
    """The mean of the parts' accuracies, each counting once however large it is (RewardBench, 2403.13787)."""
    return float(numbers([p.accuracy for p in parts.values()]).mean())


def cohen_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """(p_o - p_e) / (1 - p_e) of two labellers' answers to the same N questions: what they agree beyond chance (Cohen 1960).
    p_o: how often they agree; p_e: how often they would, each with his own frequencies. NaN where p_e is 1: they say one
    thing only."""
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} answers against {len(b)}: they must pair up, and there must be some")
    observed = sum(x == y for x, y in zip(a, b)) / len(a)
    chance = sum(list(a).count(c) * list(b).count(c) for c in set(a)) / len(a) ** 2
    return math.nan if chance == 1 else (observed - chance) / (1 - chance)


def fleiss_kappa(counts) -> float:
    """The same for n >= 2 labellers, not always the same ones (Fleiss 1971). counts [N,C]: how many of them gave question i
    answer c; every row adds up to n. NaN where all answers are one."""
    counts = numbers(counts, dimensions=(2,))
    n = counts.sum(1)
    if not (n == n[0]).all() or n[0] < 2:
        raise ValueError(f"every question needs the same number of answers, two or more; got {int(n.min())} to {int(n.max())}")
    observed = ((counts**2).sum() - counts.sum()) / (len(counts) * n[0] * (n[0] - 1))
    chance = float(((counts.sum(0) / counts.sum()) ** 2).sum())
    return math.nan if chance == 1 else float((observed - chance) / (1 - chance))
