"""Best of n: the simplest policy that a reward improves. Nothing is trained; what it costs is n answers, what it moves is known."""

from __future__ import annotations

from typing import Callable, NamedTuple

import jax
import numpy as np

from jaxalign import shard
from jaxalign.data.sources import Offline, eval_batches
from jaxalign.evals import stats
from jaxalign.rl.engine import generate
from jaxalign.rl.online import repeated
from jaxalign.rl.rollout import Sampling, check_length
from jaxalign.types import Model, Prompts, Tree


class Best(NamedTuple):
    """Of P prompts, in their order; the same on every process."""

    completions: list[list[str]]  # P x n, as sampled
    scores: np.ndarray  # f64[P,n]; NaN = unscorable
    truncated: np.ndarray  # bool[P,n]; ran out of room before a stop token
    length: np.ndarray  # i64[P,n]; tokens, stop included
    best: np.ndarray  # i64[P]; which has the highest score, of equals the first

    def curve(self, gold=None) -> list[dict]:
        """[{"n", "kl", "score"}] at n = 1, 2, 4, ..., n: what best of n would score, without bias from all samples, and its KL to the
        policy that sampled, in nats (exact where no two answers tie, else an upper bound). gold f[P,n]: another score of the same
        answers, of which "gold" is the mean over the chosen ones: where it falls while "score" rises, the reward is being
        over-optimised. Prompts with an unscorable answer are left out."""
        whole = np.isfinite(self.scores).all(1)
        n = self.scores.shape[1]
        sizes = sorted({*(2**i for i in range(n.bit_length()) if 2**i <= n), n})
        proxy = self.scores[whole]
        of = lambda values, k: stats.best_of_n(proxy, values, k) if whole.any() else float("nan")
        more = lambda k: {} if gold is None else {"gold": of(np.asarray(gold)[whole], k)}
        return [{"n": k, "kl": stats.best_of_n_kl(k), "score": of(proxy, k), **more(k)} for k in sizes]


def best_of(model: Model, params: Tree, how: Sampling, prompts: Offline, decode: Callable, scorer: Callable, key, mesh, n: int, *, draft: tuple | None = None) -> Best:
    """n answers to each row of `prompts`, which is read once, scored by `scorer` (`rl.rewards`: learned, Python, ensemble; `rl.comparisons`)."""
    check_length(model, prompts.report()["max_length"] + how.max_new, "the longest prompt with max_new")
    parts, spare = [], None
    with jax.set_mesh(mesh):
        for batch in eval_batches(prompts):
            spare = batch if spare is None else spare
            batch = _filled(batch, spare)
            rollout = generate(model, how, params, shard.place(batch._replace(records=()), mesh), key, group=n, draft=draft)
            scores = scorer(rollout, repeated(batch, n))
            scores = getattr(scores, "scores", scores)
            scores = scores if scores.ndim == 1 else scores.sum(1)
            real = shard.to_host(shard.place(batch.row, mesh)) >= 0  # the last batch is filled up with empty rows
            groups = lambda x: shard.to_host(x).reshape(len(real), n, *x.shape[1:])[real]
            parts.append([groups(x) for x in (rollout.tokens, rollout.mask, rollout.truncated, scores)])
    texts = [[decode(t[m > 0]) for t, m in zip(*group)] for tokens, mask, *_ in parts for group in zip(tokens, mask)]
    length, truncated, scores = (np.concatenate(v) for v in zip(*((mask.sum(-1), *rest) for _, mask, *rest in parts)))
    scores = scores.astype(float)
    return Best(texts, scores, truncated > 0, length.astype(int), np.argmax(np.where(np.isnan(scores), -np.inf, scores), 1))


def _filled(batch: Prompts, spare: Prompts) -> Prompts:
    """The last batch's empty rows hold a prompt too, the first of all: a reward function need not know of rows without a record."""
    empty = batch.row < 0
    tokens, segments, positions = (np.where(empty[:, None], first[:1], x) for x, first in zip(batch[:3], spare[:3]))
    return batch._replace(tokens=tokens, segments=segments, positions=positions, records=tuple(spare.records[0] if e else r for e, r in zip(empty, batch.records)))
