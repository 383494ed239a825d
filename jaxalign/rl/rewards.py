"""Scores of rollouts: from a learned model on the device, or from any Python function on the host.

A scorer is called as ``scorer(rollout, prompts) -> f32[B]``, or f32[B,T] of each token (global arrays), or a `Scored` with
what these are made of. Its attribute `where`, if it has one, says
what it needs: "device" (a rollout alone; prompts may be None) or "host" (no device: it may run in a thread, as far as `halves` says).
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any, Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import shard
from jaxalign.objectives.reward import AGGREGATE, step_ends
from jaxalign.ops import advantage
from jaxalign.rl.functions import Cases, Failure, Here, Limits, Pool, Tally
from jaxalign.types import Prompts, Rollout, ScalarModel, Tree, UserError


@functools.partial(jax.jit, static_argnums=0)
def model_scores(model: ScalarModel, params: Tree, rows) -> jax.Array:
    """f32[B]: a reward model's score of anything with tokens, segments and positions."""
    return model.reward(params, rows.tokens, rows.segments, rows.positions)


def learned(model: ScalarModel, params: Tree) -> Callable:
    """Scores by a reward model that shares the policy's tokenizer."""
    return _where("device", lambda rollout, prompts: model_scores(model, params, rollout))


def _where(what: str, scorer: Callable) -> Callable:
    scorer.where = what
    return scorer


def halves(scorer: Callable) -> tuple[Callable, Callable]:
    """(call, finish) with scorer(rollout, prompts) == finish(rollout, call(rollout, prompts)): the first may run in a thread; the second may
    talk to the other processes, which a thread must not, because they do so in one order."""
    return getattr(scorer, "halves", (scorer, lambda rollout, said: said))


def _halved(call: Callable, finish: Callable) -> Callable:
    def scorer(rollout, prompts):
        return finish(rollout, call(rollout, prompts))

    scorer.halves = call, finish
    return _where("host", scorer)


@functools.partial(jax.jit, static_argnums=(0, 4))
def step_scores(model: ScalarModel, params: Tree, rows, breaks, aggregate: str = "min") -> jax.Array:
    """f32[B]: a process reward model's probability that an answer is right, from those of its steps (`objectives.reward.AGGREGATE`).
    rows: anything with tokens, mask (1 on the answer), segments and positions; breaks bool[V]: see `objectives.reward.step_ends`."""
    scores = model.scores(params, rows.tokens, rows.segments, rows.positions)
    return AGGREGATE[aggregate](scores, step_ends(rows.tokens, rows.mask, breaks))


def process(model: ScalarModel, params: Tree, breaks, aggregate: str = "min") -> Callable:
    """Scores whole answers by the steps that a process reward model sees in them; "each": every step at its end, f32[B,T]."""
    if aggregate == "each":
        return _where("device", lambda rollout, prompts: step_rewards(model, params, rollout, breaks))
    return _where("device", lambda rollout, prompts: step_scores(model, params, rollout, breaks, aggregate))


@functools.partial(jax.jit, static_argnums=0)
def step_rewards(model: ScalarModel, params: Tree, rows, breaks) -> jax.Array:
    """f32[B,T]: at the end of each step the probability that it is right, 0 elsewhere (Math-Shepherd, 2312.08935, section 3.5)."""
    scores = model.scores(params, rows.tokens, rows.segments, rows.positions)
    return jax.nn.sigmoid(scores) * step_ends(rows.tokens, rows.mask, breaks)


def line_breaks(decode: Callable, vocab: int, size: int) -> np.ndarray:
    """bool[size]: the ids, of `vocab` that a tokenizer has, whose text holds a line break."""
    return np.array([i < vocab and "\n" in decode([i]) for i in range(size)])


def averaged(members: Sequence[Tree]) -> Tree:
    """The mean of the weights of models fine-tuned from one start, heads included (WARM, Rame et al. 2401.12187, eq. 2): one
    forward, where an ensemble takes as many as it has members."""
    return jax.tree.map(lambda *x: (sum(a.astype(jnp.float32) for a in x) / len(x)).astype(x[0].dtype), *members)


# How the scores f32[M,B] of M models become one: mean, worst case, mean less `uncertainty` times the variance between models (Coste
# et al. 2023, 2310.02743, section 3); median; mean less `uncertainty` times the standard deviation, a lower confidence bound
# (Eisenstein et al. 2312.09244). Each model's scores should have mean 0 and std 1 on the same samples: see `normalise`.
COMBINE: dict[str, Callable] = {
    "mean": lambda s, uncertainty: s.mean(0),
    "min": lambda s, uncertainty: s.min(0),
    "apart": lambda s, uncertainty: (s if s.ndim == 2 else s.sum(2)).T,  # f32[B,M]: rewards that are no ensemble, for advantages of several (`rl.experience.group_experience`)
    "median": lambda s, uncertainty: jnp.median(s, 0),
    "mean_less_variance": lambda s, uncertainty: s.mean(0) - uncertainty * s.var(0),
    "mean_less_std": lambda s, uncertainty: s.mean(0) - uncertainty * s.std(0),
}


def ensemble(scorers: Sequence[Callable], combine: str = "mean", uncertainty: float = 0.1) -> Callable:
    """Scores by several models (or functions) as one. Where they disagree none of them knows, and a policy that seeks such
    texts out is held back by "min" and "mean_less_variance"."""
    if len(scorers) == 1:
        return scorers[0]
    together = jax.jit(lambda scores: COMBINE[combine](jnp.stack(scores), uncertainty))
    alike = {getattr(s, "where", "") for s in scorers} == {"device"}
    return _where("device" if alike else "", lambda rollout, prompts: together([s(rollout, prompts) for s in scorers]))


def none(rollout: Rollout, prompts: Prompts) -> jax.Array:
    """f32[B]: 0, where nobody scores."""
    return jnp.zeros_like(rollout.truncated)


none.where = "device"


class Scored(NamedTuple):
    """Scores with what they are made of; NaN is no score. A scorer may return this or the scores alone."""

    scores: Any  # f32[B], or f32[B,T] for each token
    parts: dict[str, Any] = {}  # name of a reward -> f32[B]
    failed: dict[str, Any] = {}  # name -> f32[B]; 1 where it gave no score of its own but failed
    environment: dict[str, Any] = {}  # what else an environment counts -> f32[B]


def scored(x) -> Scored:
    return x if isinstance(x, Scored) else Scored(x)


@jax.jit
def summary(s: Scored) -> dict[str, jax.Array]:
    """f32[] each: `rewards/NAME/mean` and `rewards/NAME/std` (unbiased) over the rows that have a score (TRL's names)."""
    out = {f"rewards/{n}/failed": x.mean() for n, x in s.failed.items()} | {f"environment/{n}": x.mean() for n, x in s.environment.items()}
    for n, x in s.parts.items():
        out |= {f"rewards/{n}/mean": jnp.nanmean(x), f"rewards/{n}/std": jnp.where((~jnp.isnan(x)).sum() > 1, jnp.nanstd(x, ddof=1), 0.0)}
    return out


def weighted_sum(scores: Sequence, weights: Sequence[float]):
    """sum_k w_k R_k over the rewards that are there (methods.md 6.1, as TRL); NaN where none is. Arrays of one shape."""
    s = jnp.stack(scores)
    there = ~jnp.isnan(s)
    total = jnp.einsum("k...,k->...", jnp.where(there, s, 0.0), jnp.asarray(weights, s.dtype))
    return jnp.where(there.any(0), total, jnp.nan)


def parts(scorers: dict[str, Callable], together: Callable) -> Callable:
    """One scorer of several, each by its name in `Scored.parts`: `together(list of scores) -> scores`. Where one scores tokens
    (f32[B,T]), the score of a whole answer stands at its last token."""

    def call(rollout, prompts) -> dict:
        return {n: halves(s)[0](rollout, prompts) for n, s in scorers.items()}

    def finish(rollout, said: dict) -> Scored:
        each = {n: scored(halves(s)[1](rollout, said[n])) for n, s in scorers.items()}
        of = [x.scores for x in each.values()]
        if any(x.ndim == 2 for x in of):
            of = [x if x.ndim == 2 else advantage.at_last(x, rollout.mask) for x in of]
        whole = {n: x.scores if x.scores.ndim == 1 else x.scores.sum(1) for n, x in each.items()}
        return Scored(together(of), whole, {k: v for x in each.values() for k, v in x.failed.items()})

    def events() -> list[dict]:
        return [e for s in scorers.values() for e in getattr(s, "events", list)()]

    where, scorer = {getattr(s, "where", "") for s in scorers.values()}, _halved(call, finish)
    scorer.events = events
    return _where(where.pop() if len(where) == 1 else "", scorer)


def several(scorers: dict[str, Callable], weights: Sequence[float] = (), combine: str = "mean", uncertainty: float = 0.1) -> Callable:
    """The weighted sum of the named scorers; without weights the ensemble of them. Each is in the metrics by its name."""
    if len(scorers) > 1 and not weights:
        return parts(scorers, jax.jit(lambda each: COMBINE[combine](jnp.stack(each), uncertainty)))
    return parts(scorers, functools.partial(weighted_sum, weights=weights) if weights else lambda each: each[0])


def short_names(paths: Sequence[str]) -> list[str]:
    """What rewards are called in metrics: a function's own name, a directory's last part; a second one of a name is NAME_2."""
    out: list[str] = []
    for p in paths:
        name = p.removeprefix("judge=").rsplit(":", 1)[-1].rstrip("/").rsplit("/", 1)[-1]
        same = sum(x == name or x.startswith(f"{name}_") and x[len(name) + 1 :].isdigit() for x in out)
        out.append(f"{name}_{same + 1}" if same else name)
    return out


def python(fn: Callable | str, decode: Callable, mesh, *, name: str = "", limits: Limits = Limits()) -> Callable:
    """Scores by a Python function; each process scores its own rows.

    fn(prompt, completion, record) -> float, or of the whole batch fn(prompts, completions, records) -> [float or None, ...]
    (`worker.whole_group` says which is which), where None is no score, and a list of numbers in place of one scores each token of
    the completion (named completion_ids, if fn asks for it). As an import path it runs in processes of its own (`functions.Pool`),
    else in this one.

    The completion is decoded without its stop token (`decode` drops special ids). What raises, overruns `limits`, or returns
    anything else raises UserError naming the function and the row; with `limits.on_error` the row has no score, or that one.
    """
    path = fn if isinstance(fn, str) else ""
    fn = _imported(path) if path else fn
    name = name or getattr(fn, "__qualname__", None) or type(fn).__name__
    caller = Pool(path, fn, limits) if path and limits.seconds else Here(fn, limits)
    events: list[dict] = []

    def call(rollout: Rollout, prompts: Prompts):
        return shard.attempt(asked, rollout, prompts)  # what it raises `finish` does, once the other processes know that they need not wait

    def asked(rollout: Rollout, prompts: Prompts) -> tuple:
        local = {f: shard.to_local(getattr(rollout, f)) for f in ("tokens", "mask", "segments", "row")}
        rows = list(zip(local["tokens"], local["mask"], local["segments"]))
        cases = Cases(
            [decode(t[(m == 0) & (s != 0)]) for t, m, s in rows],
            [decode(t[m > 0]) for t, m, s in rows],
            list(prompts.records) if prompts.records else [{}] * len(rows),
            [t[m > 0].tolist() for t, m, s in rows],
        )
        said, instead, failed = caller.score(cases), limits.instead(), np.zeros(len(rows), np.float32)
        if not caller.group:  # of a single row None and NaN are mistakes, and so is a list where no other row has one
            said = [Failure(f"returned {x!r}") if isinstance(x, list) or x != x else x for x in said]
        broken = not caller.group and Tally.of(limits, said).broken
        for i, (value, mask) in enumerate(zip(said, local["mask"])):
            if isinstance(value, list) and len(value) != int((mask > 0).sum()):
                value = Failure(f"returned {len(value)} numbers for the {int((mask > 0).sum())} tokens of a completion")
            if isinstance(value, Failure):
                problem = f"reward function {name} {value.why} for row {local['row'][i]} (prompt {cases.prompts[i][:80]!r})" + (f", at {value.at}" if value.at else "")
                if instead is None or broken:
                    hint = "; it must return a finite number" + (" or None" if caller.group else "") + ("" if instead is None else f" (and most rows hang, whatever rl.on_reward_error {limits.on_error})")
                    raise UserError(problem + hint)
                events.append({"kind": "reward_failed", "function": name, "row": int(local["row"][i]), "error": value.why, "at": value.at})
                failed[i], said[i] = 1, instead
        return said, failed

    def finish(rollout: Rollout, answers: tuple | Exception):
        # Where every row of a process failed, it is the others that know whether tokens are scored.
        known = shard.agreed(2 if isinstance(answers, Exception) else int(any(isinstance(x, list) for x in answers[0])))
        if known == 2:
            raise answers if isinstance(answers, Exception) else UserError(f"reward function {name} failed in another process, which says how")
        (said, failed), tokens, masks = answers, known == 1, shard.to_local(rollout.mask)
        out = np.zeros(masks.shape if tokens else len(said), np.float32)
        for i, (value, mask) in enumerate(zip(said, masks)):
            if isinstance(value, list):
                out[i, mask > 0] = value
            elif tokens:
                out[i, np.flatnonzero(mask > 0)[-1:]] = value
            else:
                out[i] = value
        out = shard.place(out, mesh)
        return out if limits.instead() is None else Scored(out, failed={name: shard.place(failed, mesh)})

    def drain() -> list[dict]:
        seen, events[:] = list(events), []
        return seen

    scorer = _halved(call, finish)
    scorer.events = drain
    return scorer


def _imported(path: str) -> Callable:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise UserError(f"cannot import {path!r}: {e}; write it as package.module:name") from None


def adjust(scores, truncated, *, missing_eos_penalty: float = 0.0, missing_eos_value: float | None = None, clip: float | None = None):
    """A completion without a stop token loses `missing_eos_penalty`, or is given `missing_eos_value` whatever its score
    (lm-human-preferences' penalty_reward_value); then clip to [-clip, clip]."""
    scores = scores - missing_eos_penalty * truncated
    if missing_eos_value is not None:
        scores = jnp.where((truncated > 0) & ~jnp.isnan(scores), missing_eos_value, scores)  # no score stays none
    return scores if clip is None else jnp.clip(scores, -clip, clip)


def adjust_tokens(scores, truncated, mask, *, missing_eos_penalty: float = 0.0, clip: float | None = None):
    """`adjust` of scores f32[B,T] for each token: the penalty stands at the last token; every token's score is clipped by itself."""
    scores = scores - advantage.at_last(missing_eos_penalty * truncated, mask)
    return scores if clip is None else jnp.clip(scores, -clip, clip)


def normalise(params: Tree, scores: np.ndarray, *, scale: bool = True) -> Tree:
    """Fold gain and bias into the head so that `scores` (of reference samples) get mean 0 and, with scale, std 1.

    r' = (r - mean) / std (lm-human-preferences; without scale InstructGPT's bias, section 3.5). Scores must be finite
    and not all equal.
    """
    mean, std = float(np.mean(scores)), float(np.std(scores))
    if not math.isfinite(mean) or (scale and not std > 0):
        raise UserError(f"cannot normalise a reward model on {len(scores)} samples with mean {mean} and std {std}: it gives all of them the same score; train it longer")
    gain = 1 / std if scale else 1.0
    head = params["head"]
    return {**params, "head": {"weight": head["weight"] * gain, "bias": (head["bias"] - mean) * gain}}
