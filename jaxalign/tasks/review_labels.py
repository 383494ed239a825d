"""The gold reward of the `reviews` world, and labellers whose noise is known.

The labellers want a review of the item they named, with the aspects they asked for, in praise, well formed and short
enough. With the completion split into sentences,

    r = 3 tanh(V / 3) + A + I - D - L          in [-7.3, 3.4]

    V  sum of the values of its opinions, at most one per subject (the item overall, each aspect, the verdict).
       A value is +- the strength of the word (0.5 mild, 1.0 strong) x its degree ("very" 1.3, ...) x -0.5 if negated
    A  0.1 x share of the requested aspects that it speaks of (0.1 if none was requested)
    I  +0.3 if it names the requested item and no other, -0.3 if it names another, 0 if it names none
    D  0.5 per defect, at most 3: a sentence no form makes, an unfinished end, an aspect of another category, a subject
       treated twice, a sentence said twice, no review at all (3)
    L  0.05 per word beyond 45, at most 1

Any string has a reward: praise repeated for ever is a string of defects. `tanh` makes one more compliment worth less
and less; D and I cannot be bought with V.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxalign.tasks import review_grammar as g

LOWEST, HIGHEST = -7.3, 3.4
WORDS, SENTENCES = 45, 64  # what lies behind the first 64 sentences is not read: D and L are at their limits by then


@functools.lru_cache(1 << 14)
def _request(prompt: str) -> tuple[str, tuple[str, ...]] | None:
    said = g.parse(prompt)
    if said is None or g.FORMS[said.form].stage != "request":
        return None
    return said.words["item"], tuple(said.words[slot] for slot in ("first", "second") if slot in said.words)


def request_of(prompt: str) -> dict | None:
    """{"item", "aspects"} that a prompt asks for; None if it is no request of this world."""
    request = _request(prompt.strip())
    return request and {"item": request[0], "aspects": list(request[1])}


def gold_reward(prompt: str, completion: str, record: Mapping | None = None) -> float:
    """The formula above, for any completion. `record` ("item", "aspects") spares reading the prompt; a prompt that
    asks for nothing in this world leaves A and I at 0 and takes aspects of every category."""
    if not record or record.get("item") not in g.CATEGORY:
        record = request_of(prompt) or {"item": None, "aspects": ()}
    item, asked = record["item"], record["aspects"]
    aspects = g.ASPECTS[g.CATEGORY[item]] if item else g.ASPECT_WORDS
    text = completion.strip(" ")
    value, defects, subjects, named, seen = 0.0, 0 if text else 6, set(), set(), set()
    for sentence in g.sentences(text)[:SENTENCES]:
        said = g.parse(sentence)
        form = said and g.FORMS[said.form]
        if not said or form.stage in ("request", "diary") or sentence in seen:
            defects += 1
            continue
        seen.add(sentence)
        named |= {said.words["item"]} if "item" in said.words else set()
        if form.about:
            subject = said.words.get("aspect", form.about)
            if subject in subjects or ("aspect" in said.words and subject not in aspects):
                defects += 1
                continue
            subjects.add(subject)
            value += said.value
    coverage = (sum(a in subjects for a in asked) / len(asked) if asked else 1.0) if item and text else 0.0
    loyalty = (0.3 if named == {item} else -0.3) if item and named else 0.0
    length = min(1.0, 0.05 * max(0, len(text.split()) - WORDS))
    return 3 * math.tanh(value / 3) + 0.1 * coverage + loyalty - min(3.0, 0.5 * defects) - length


def gold_rewards(
    prompts: Sequence[str], completions: Sequence[str], records: Sequence[Mapping | None] | None = None
) -> np.ndarray:
    """`gold_reward` of every row, f64[N]."""
    rows = zip(prompts, completions, records or [None] * len(prompts), strict=True)
    return np.array([gold_reward(*row) for row in rows], np.float64)


def plackett_luce(
    rewards: Sequence[float], texts: Sequence[str], temperature: float, rng: np.random.Generator
) -> list[int]:
    """Ranks (0 = best) by reward / T + Gumbel noise, so that P(order) = prod_k exp(r_k/T) / sum_{j >= k} exp(r_j/T);
    for two, P(a before b) = sigma((r_a - r_b) / T). Identical texts are one candidate and share its rank."""
    first = {text: i for i, text in reversed(list(enumerate(texts)))}  # text -> where it first stands
    kept = sorted(first.values())
    utility = np.asarray(rewards, float)[kept] / temperature + rng.gumbel(size=len(kept))
    rank = {texts[kept[i]]: place for place, i in enumerate(np.argsort(-utility))}
    return [rank[text] for text in texts]


def pairs_of(rankings: Sequence[Mapping]) -> list[dict]:
    """{"prompt", "chosen", "rejected"} for every pair of a ranking that does not tie."""
    out = []
    for row in rankings:
        ranked = list(zip(row["ranks"], row["completions"]))
        out += [{"prompt": row["prompt"], "chosen": a, "rejected": b} for i, a in ranked for j, b in ranked if i < j]
    return out


def gold_accuracy(pairs: Sequence[Mapping], temperature: float) -> dict[str, float]:
    """How well the gold reward itself agrees with the labellers on {"prompt", "chosen", "rejected"}.

    realised: share of the pairs whose chosen side has the higher reward (equal rewards count one half)
    expected: mean of sigma(|difference| / T), what `realised` is on average over labels, and the best that any reward
    model can do
    """
    prompts = [pair["prompt"] for pair in pairs]
    gap = gold_rewards(prompts, [p["chosen"] for p in pairs]) - gold_rewards(prompts, [p["rejected"] for p in pairs])
    expected = 1 / (1 + np.exp(-np.abs(gap) / temperature))
    return {"realised": float(np.mean((gap > 0) + 0.5 * (gap == 0))), "expected": float(np.mean(expected))}
