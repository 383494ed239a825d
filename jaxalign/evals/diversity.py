"""How different are the answers? A text is a sequence of tokens of any kind (ids, or words: a string is split at blanks)."""

from __future__ import annotations

import collections
import math
from typing import Sequence

import numpy as np

Text = Sequence  # of anything hashable; a str is cut into words


def distinct(texts: Sequence[Text], n: int) -> float:
    """Different n-grams / all n-grams of the whole set (Li et al. 1510.03055). It falls with the number of tokens: compare at equal
    budgets. 0 where no text has n tokens."""
    counts = sum((_ngrams(_tokens(t), n) for t in texts), collections.Counter())
    return len(counts) / max(counts.total(), 1)


def distinct_within(texts: Sequence[Text], n: int) -> float:
    """The same of each text alone, averaged over those with n tokens or more: low where a text repeats itself."""
    each = [_ngrams(_tokens(t), n) for t in texts]
    ratios = [len(c) / c.total() for c in each if c]
    return sum(ratios) / max(len(ratios), 1)


def bleu(hypotheses: Sequence[Text], references: Sequence[Sequence[Text]], *, effective_order: bool = False) -> float:
    """Corpus BLEU, 0 to 100: 100 BP exp(mean log p_n), n = 1..4, with counts clipped and summed over the corpus (Papineni et al.
    2002), on tokens as they come. As sacrebleu: the closest reference length, the shorter of two; the k-th precision that is
    0 becomes 1 / (2^k total). effective_order: orders that no hypothesis has are left out (sacrebleu's sentence BLEU), else they
    make it 0.
    """
    return _score(*bleu_counts(hypotheses, references), effective_order)


def bleu_counts(hypotheses: Sequence[Text], references: Sequence[Sequence[Text]]):
    """What BLEU is made of: (n-grams also in a reference [4], n-grams [4], length of the hypotheses, length of the closest references)."""
    matched, total, length, wanted = np.zeros(4), np.zeros(4), 0, 0
    for h, refs in zip(hypotheses, references, strict=True):
        h, refs = _tokens(h), [_tokens(r) for r in refs]
        length += len(h)
        wanted += min((len(r) for r in refs), key=lambda n: (abs(n - len(h)), n))
        for k in range(4):
            own = _ngrams(h, k + 1)
            most: collections.Counter = collections.Counter()
            for r in refs:
                most |= _ngrams(r, k + 1)
            matched[k] += (own & most).total()
            total[k] += own.total()
    return matched, total, length, wanted


def self_bleu(texts: Sequence[Text]) -> float:
    """The mean sentence BLEU of each text with all others as its references, 0 to 100 (Zhu et al. 1802.01886): high where texts are
    alike. Two texts or more."""
    texts = [_tokens(t) for t in texts]
    if len(texts) < 2:
        raise ValueError(f"self-BLEU compares texts with one another; got {len(texts)}")
    lengths = np.array([len(t) for t in texts])
    grams = [[_ngrams(t, k) for t in texts] for k in range(1, 5)]
    matched, total = np.zeros((len(texts), 4)), np.zeros((len(texts), 4))
    for k, counters in enumerate(grams):
        # The highest count of an n-gram among the others is the highest of all, or the second one for the text that has it.
        first: dict = {}
        second: dict = {}
        for i, c in enumerate(counters):
            for g, n in c.items():
                top = first.get(g, (0, -1))
                if n > top[0]:
                    first[g], second[g] = (n, i), top[0]
                else:
                    second[g] = max(second.get(g, 0), n)
        for i, c in enumerate(counters):
            matched[i, k] = sum(min(n, second[g] if first[g][1] == i else first[g][0]) for g, n in c.items())
            total[i, k] = c.total()
    scores = []
    for i, n in enumerate(lengths):
        others = np.delete(lengths, i)
        wanted = int(others[np.lexsort((others, np.abs(others - n)))[0]])
        scores.append(_score(matched[i], total[i], int(n), wanted, True))
    return float(np.mean(scores))


def _score(matched, total, length: int, wanted: int, effective_order: bool) -> float:
    logs, zeros = [], 0
    if not matched.any():
        return 0.0
    for m, t in zip(matched, total):
        if not t:
            if effective_order:
                break
            return 0.0
        if not m:
            zeros += 1
        logs.append(math.log(m / t if m else 1 / (2**zeros * t)))
    penalty = min(0.0, 1 - wanted / length)
    return 100 * math.exp(penalty + sum(logs) / len(logs))


def _tokens(text: Text) -> tuple:
    return tuple(text.split()) if isinstance(text, str) else tuple(text)


def _ngrams(tokens: tuple, n: int) -> collections.Counter:
    return collections.Counter(zip(*(tokens[i:] for i in range(n))))
