"""What a policy does: samples over a set of prompts, its KL to a reference, scores of texts by a reward model."""

from __future__ import annotations

import functools
from typing import Callable, NamedTuple

import jax
import numpy as np

from jaxalign import shard
from jaxalign.data.sources import Offline, eval_batches
from jaxalign.ops.divergence import divergence, reverse_kl
from jaxalign.ops.logprob import before, targets
from jaxalign.rl.engine import generate
from jaxalign.rl.experience import token_logps
from jaxalign.rl.rewards import model_scores
from jaxalign.rl.rollout import Sampling, check_length
from jaxalign.types import Labelled, Model, Pairs, Rankings, ScalarModel, Tree


class Samples(NamedTuple):
    """One entry per prompt row of the source, in its order; the same on every process."""

    completions: list[str]
    logp: np.ndarray  # f64[N]; of the whole completion, under the model that sampled, at temperature 1 (decoded by Q heads: at its own)
    ref_logp: np.ndarray  # f64[N]; the same under the reference (equal to logp without one)
    length: np.ndarray  # i64[N]; tokens, stop included
    truncated: np.ndarray  # bool[N]
    kl: float = 0.0  # to the reference, nats per completion: `summed_kl` / N; of Q heads the mean of logp - ref_logp
    proxy: np.ndarray | None = None  # f64[N]; of a learned reward, where one was given


@functools.partial(jax.jit, static_argnums=0)
def summed_kl(model: Model, params: Tree, reference: Tree, rollout, rows) -> jax.Array:
    """f32[]: the sum over rows f32[B] and their tokens of KL(policy || reference), each over the whole vocabulary. Its mean is the
    completions' KL, as that of log-ratios is, with a fraction of the variance: only which tokens came before is left to chance."""
    at = rollout.tokens, rollout.segments, rollout.positions
    x, y = (before(model.hidden(p, *at).x, rollout.segments) for p in (params, reference))
    mask = targets(rollout.mask, rollout.segments) * rows[:, None]
    return divergence(x, model.unembed(params), y, model.unembed(reference), rollout.tokens, mask, reverse_kl).divergence


def sample(model: Model, params: Tree, how: Sampling, prompts: Offline, decode: Callable, key, mesh, *, reference: Tree | None = None, score: bool = True, draft: tuple | None = None, judge: tuple[ScalarModel, Tree] | None = None) -> Samples:
    """One completion per row of `prompts` (give a record several times for several).

    draft: a smaller model and its weights, where how.draft names one. judge: a reward model and its weights. score=False skips the log-probs (0 then): labelling does not need them.
    """
    check_length(model, prompts.report()["max_length"] + how.max_new, "the longest prompt with max_new")
    parts, nats = [], 0.0
    with jax.set_mesh(mesh):
        for batch in eval_batches(prompts):
            rollout = generate(model, how, params, shard.place(batch._replace(records=()), mesh), key, draft=draft)
            own = hasattr(model, "next_logits")  # it says itself what it draws from, and the sampler kept that
            total = lambda p: token_logps(getattr(model, "trunk", model), p, rollout).logp.sum(1)
            logp = rollout.truncated * 0 if not score else rollout.logp.sum(1) if own else total(params)
            ref = total(reference) if score and reference is not None else logp
            proxy = logp * 0 if judge is None else model_scores(*judge, rollout)
            real = shard.to_host(rollout.row) >= 0  # the last batch is filled up with empty rows
            if score and reference is not None and not own:
                nats += float(summed_kl(model, params, reference, rollout, (rollout.row >= 0).astype(np.float32)))
            parts.append([shard.to_host(x)[real] for x in (rollout.tokens, rollout.mask, rollout.truncated, logp, ref, proxy)])
    texts = [decode(t[m > 0]) for tokens, mask, *_ in parts for t, m in zip(tokens, mask)]
    length, truncated, logp, ref, proxy = (np.concatenate(v) for v in zip(*((mask.sum(1), *rest) for _, mask, *rest in parts)))
    kl = float((logp.astype(float) - ref).mean()) if own else nats / len(texts)
    return Samples(texts, logp.astype(float), ref.astype(float), length.astype(int), truncated > 0, kl, None if judge is None else proxy.astype(float))


def reference_scores(model: Model, params: Tree, how: Sampling, prompts: Offline, scalar: ScalarModel, judge: Tree, key, mesh) -> np.ndarray:
    """f32[N]: a reward model's scores of one answer to each prompt, drawn from a policy; the same on every process."""
    check_length(model, prompts.report()["max_length"] + how.max_new, "the longest prompt with max_new")
    out = []
    with jax.set_mesh(mesh):
        for batch in eval_batches(prompts):
            rollout = generate(model, how, params, shard.place(batch._replace(records=()), mesh), key)
            out.append(shard.to_host(model_scores(scalar, judge, rollout))[shard.to_host(rollout.row) >= 0])
    return np.concatenate(out)


def row_scores(model: ScalarModel, params: Tree, source: Offline, mesh) -> tuple[np.ndarray, np.ndarray]:
    """(rewards f32[N], labels f32[N], 0 where there are none) of the rows of a source of labels or, one text a row, of tokens; the
    same on every process."""
    out = []
    with jax.set_mesh(mesh):
        for batch in eval_batches(source):
            rows, label = (batch.rows, batch.label) if isinstance(batch, Labelled) else (batch, batch.mask[:, 0])
            placed, real, label = shard.place((rows, rows.segments.any(1), label), mesh)
            scores, real, label = (shard.to_host(x) for x in (model_scores(model, params, placed), real, label))
            out.append((scores[real], label[real]))
    return tuple(np.concatenate(x) for x in zip(*out))


def judged_steps(model: ScalarModel, params: Tree, source: Offline, mesh) -> list[tuple[np.ndarray, np.ndarray]]:
    """(log-odds f32[n], labels f32[n]) of the n judged steps of every answer of a source of `Steps`; the same on every process."""
    go, out = jax.jit(lambda p, rows: model.scores(p, rows.tokens, rows.segments, rows.positions)), []
    with jax.set_mesh(mesh):
        for batch in eval_batches(source):
            placed = shard.place(batch, mesh)
            scores, mask, label = (shard.to_host(x) for x in (go(params, placed.rows), placed.rows.mask, placed.label))
            out += [(s[m > 0], y[m > 0]) for s, m, y in zip(scores, mask, label) if m.any()]
    return out


def candidate_lengths(candidates: Offline, mesh) -> list[np.ndarray]:
    """Tokens i64[K] of the answers that `candidate_scores` scores; the same on every process."""
    out = []
    for batch in eval_batches(candidates):
        if isinstance(batch, Pairs):
            length = np.stack([batch.chosen.mask.sum(1), batch.rejected.mask.sum(1)], 1)
            valid = length.all(1, keepdims=True).repeat(2, 1)
        else:
            length, valid = batch.candidates.mask.sum(2), batch.valid
        length, valid = (shard.to_host(x) for x in shard.place((length.astype(np.float32), valid.astype(np.float32)), mesh))
        out += [x[v > 0].astype(int) for x, v in zip(length, valid) if v.any()]
    return out


def candidate_scores(model: ScalarModel, params: Tree, rankings: Offline, mesh) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rewards f32[K], ranks i32[K]) of every prompt of a rankings source, or [2] of every pair; the same on every process."""
    out = []
    with jax.set_mesh(mesh):
        for batch in eval_batches(rankings):
            if isinstance(batch, Pairs):
                both = jax.tree.map(lambda w, l: np.stack([w, l], 1), batch.chosen, batch.rejected)
                valid = (batch.chosen.mask.any(1) & batch.rejected.mask.any(1))[:, None].repeat(2, 1)
                batch = Rankings(both, np.tile(np.array([0, 1], np.int32), (len(valid), 1)), valid.astype(np.float32))
            b, k, t = batch.candidates.tokens.shape
            rows = shard.place(jax.tree.map(lambda a: a.reshape(b * k, t), batch.candidates), mesh)
            rank, valid = (shard.to_host(x) for x in shard.place((batch.rank, batch.valid), mesh))
            scores = shard.to_host(model_scores(model, params, rows)).reshape(-1, k)
            out += [(s[v > 0], r[v > 0]) for s, r, v in zip(scores, rank, valid) if v.any()]
    return out

