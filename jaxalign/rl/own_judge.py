"""A judge that is a model of ours: the probability of each of its verdicts, by one forward pass (`rl.judge` has the questions)."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Sequence

import numpy as np

from jaxalign import shard
from jaxalign.data.templates import encode_prompt
from jaxalign.rl.experience import token_logps
from jaxalign.rl.judge import RATINGS, rating_prompt
from jaxalign.types import Model, Tokens, Tree

ROWS = 32  # at a time, in each process


@dataclasses.dataclass(frozen=True)
class Own:
    """A causal model with its own tokenizer and template."""

    model: Model
    params: Tree
    tokenizer: Any
    template: Any
    mesh: Any

    def odds(self, questions: Sequence[str], options: Sequence[str]) -> np.ndarray:
        """f64[N,K]: the probability of each option as the whole beginning of the answer, over the options. A question that is too
        long for a model with learned positions loses its beginning."""
        lead = getattr(self.template, "lead", "")
        said = [self.tokenizer.encode(lead + o) for o in options]
        most = (getattr(self.model, "positions", None) or 1 << 30) - max(map(len, said))
        rows = [(ids[-most:], o) for q in questions for ids in [encode_prompt(q, self.tokenizer, self.template)] for o in said]
        n, T = shard.agreed(len(rows)), shard.agreed(max((len(a) + len(b) for a, b in rows), default=1))
        T = 1 << (T - 1).bit_length() if T <= most else T
        shards = shard.batch_shards(self.mesh)
        most = -(-ROWS // shards) * shards
        out = []
        for at in range(0, n, most):
            part = rows[at : at + most]
            x = Tokens(*(np.zeros((most, T), k) for k in (np.int32, np.float32, np.int32, np.int32)))
            for i, (ids, o) in enumerate(part):
                end = len(ids) + len(o)
                x.tokens[i, :end], x.segments[i, :end], x.positions[i, :end] = [*ids, *o], 1, np.arange(end)
                x.mask[i, len(ids) : end] = 1
            logp = token_logps(self.model, self.params, shard.place(x, self.mesh)).logp.sum(1)
            out.append(shard.to_local(logp)[: len(part)])
        logp = np.concatenate(out).astype(float).reshape(len(questions), len(options))
        p = np.exp(logp - logp.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    def ratings(self, prompts: Sequence[str], completions: Sequence[str], rubric: str = "") -> np.ndarray:
        """f64[N] from 0 to 1: the expected rating, (E - 1) / 4 (probabilities in place of one sampled digit: G-Eval, 2303.16634)."""
        p = self.odds([rating_prompt(q, c, rubric) for q, c in zip(prompts, completions)], RATINGS)
        return (p @ np.arange(1, len(RATINGS) + 1) - 1) / (len(RATINGS) - 1)

    def prefers(self, questions: Sequence[str]) -> np.ndarray:
        """f64[N]: p(A) / (p(A) + p(B)); for `judge.compare`."""
        return self.odds(questions, ("A", "B"))[:, 0]


def judged(judge: Own, decode: Callable, mesh, rubric: str = "") -> Callable:
    """A scorer: the judge's rating of every rollout. It reads text, so policy and judge may have other vocabularies."""

    def scorer(rollout, prompts):
        tokens, mask, segments = (shard.to_local(x) for x in (rollout.tokens, rollout.mask, rollout.segments))
        asked = [decode(t[(m == 0) & (s != 0)]) for t, m, s in zip(tokens, mask, segments)]
        said = [decode(t[m > 0]) for t, m in zip(tokens, mask)]
        return shard.place(judge.ratings(asked, said, rubric).astype(np.float32), mesh)

    return scorer
