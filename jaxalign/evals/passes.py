"""Answers that are right or wrong: pass@k, maj@k, exact match. P problems, n samples of each."""

from __future__ import annotations

import collections
import re
from typing import Hashable, Sequence

import numpy as np

from jaxalign.evals.stats import numbers


def pass_at_k(correct, k: int) -> float:
    """The chance that one of k samples is right, without bias, averaged over problems: 1 - C(n-c, k) / C(n, k), as
    1 - prod_{i=n-c+1..n} (1 - k/i) (Chen et al. 2107.03374, section 2.1).

    correct f[P,n]: 1 where a sample is right; n >= k.
    """
    return float(each_pass_at_k(correct, k).mean())


def each_pass_at_k(correct, k: int) -> np.ndarray:
    """f64[P]: `pass_at_k` of every problem, for intervals over them."""
    correct = numbers(correct, dimensions=(2,))
    n = correct.shape[1]
    if not 1 <= k <= n or not np.isin(correct, (0, 1)).all():
        raise ValueError(f"pass@{k} needs {k} samples or more of each problem, each right (1) or wrong (0); there are {n}")
    i = np.arange(1, n + 1)
    drawn = np.where(i > n - correct.sum(1, keepdims=True), 1 - np.minimum(k / i, 1), 1.0)
    return 1 - drawn.prod(1)


def majority(answers: Sequence[Hashable]) -> Hashable:
    """The most frequent answer, of equal ones the first; None (no answer was found) has no vote, and wins only alone."""
    counts = collections.Counter(a for a in answers if a is not None)
    return max(counts, key=counts.get) if counts else None  # a Counter keeps the order of first appearance


def maj_at_k(answers: Sequence[Sequence[Hashable]], correct, k: int) -> float:
    """How often the `majority` of the first k answers to a problem is right (self-consistency, Wang et al. 2203.11171).

    answers: n of each of P problems, None where none was found; correct f[P,n]: which of them are right.
    """
    return float(np.mean(each_maj_at_k(answers, correct, k)))


def each_maj_at_k(answers: Sequence[Sequence[Hashable]], correct, k: int) -> np.ndarray:
    """f64[P]: of every problem."""
    correct = numbers(correct, dimensions=(2,))
    if len(answers) != len(correct) or not 1 <= k <= correct.shape[1] or any(len(a) != correct.shape[1] for a in answers):
        raise ValueError(f"maj@{k} needs {k} answers or more to each of {len(correct)} problems, and as many verdicts as answers")
    votes = [majority(a[:k]) for a in answers]
    return np.array([0.0 if v is None else row[list(a).index(v)] for v, a, row in zip(votes, answers, correct)])


def normalised(text: str) -> str:
    """A text without what an exact match should not turn on: case, blanks around and between, a full stop at the end."""
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").rstrip().casefold()


def exact_match(answer: str, reference: str | Sequence[str]) -> float:
    """1 where the answer, `normalised`, is the reference, or one of several."""
    references = [reference] if isinstance(reference, str) else reference
    return float(normalised(answer) in {normalised(r) for r in references})
